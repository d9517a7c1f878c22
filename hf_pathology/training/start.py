"""How a recipe starts and ends: the accelerator, the seed, one line for a user's mistake, an honest exit code."""

import ctypes
import sys
import traceback
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    parse_choice_from_env,
    parse_flag_from_env,
    set_seed,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.utils import logging

from ..errors import UserError
from .interrupt import Interrupted


def start(*, cpu: bool, seed: int) -> Accelerator:
    """The accelerator of this process, with the random generators seeded by `seed`, so that all ranks make equal models.

    The training loop seeds them by the rank, too. Raises UserError for fp16 and for DeepSpeed.
    """
    # What `accelerate launch` was told stands in the environment; an Accelerator for either would fail less clearly.
    if parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no") == "fp16":
        raise UserError(
            "mixed precision fp16 is refused: its range is too small for these losses, which end as NaN, and gradients "
            "are clipped one by one, which its loss scaling does not allow; choose bf16 or no"
        )
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "DeepSpeed is refused: it keeps weights in half precision, in which the small steps of a teacher that follows "
            "its student round to nothing; use recipes/accelerate/ddp.yaml, or fsdp2.yaml for very large models"
        )
    accelerator = Accelerator(
        cpu=cpu,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)],
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.is_fsdp2:
        leave_precision_to_autocast(accelerator)
    set_seed(seed)
    return accelerator


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # the names of mallopt(3) for its parameters


def keep_freed_memory() -> None:
    """Lets glibc keep memory that is freed, since each step takes again what the last one gave back.

    Where memory is returned to the system, a small step on a CPU spends a tenth of its time on making fresh pages
    (`benchmarks/pretrain.py --small`). Does nothing where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def leave_precision_to_autocast(accelerator: Accelerator) -> None:
    """Gathers and reduces in float32 under FSDP2, where accelerate would cast the weights, the loss and the sums to bf16.

    The training loop computes in autocast, which then decides what is done in bf16, just as with DDP.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        reduce_dtype=torch.float32, output_dtype=torch.float32
    )


def run_recipe(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Runs `main(argv)` and exits: 0 when all was done, 1 with one line for a mistake, 128 + signal when stopped."""
    logging.disable_progress_bar()  # ours say more than the bars of each file that is loaded
    try:
        try:
            main(argv)
        except BaseException as error:
            # What an error has passed through would live until the process ends: a loader, too, whose workers the process
            # would wait for without an end, since they do not heed the signal by which it ends them.
            traceback.clear_frames(error.__traceback__)
            raise
    except UserError as error:
        print(f"error: {_words(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except Interrupted as error:
        print(error, file=sys.stderr)
        raise SystemExit(128 + error.signal) from None
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {error.strerror}: {error.filename or ''}", file=sys.stderr)
        raise SystemExit(1) from None


def _words(error: UserError) -> str:
    """The message alone, of an error in a loader's worker too, to which torch adds the worker's traceback."""
    text = str(error)
    return text.rstrip().rpartition(f"{type(error).__name__}: ")[2] if text.startswith("Caught ") else text
