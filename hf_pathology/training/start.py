"""How a recipe starts and ends: the accelerator, the seed, one line for a user's mistake, an honest exit code."""

import sys
from collections.abc import Callable, Sequence

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from transformers.utils import logging

from ..errors import UserError
from .interrupt import Interrupted


def start(*, cpu: bool, seed: int) -> Accelerator:
    """The accelerator of this process, with the random generators seeded by `seed` and the rank.

    The models must be made before, from `seed` alone, or be equal on all ranks by other means.
    """
    accelerator = Accelerator(
        cpu=cpu,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)],
    )
    set_seed(seed)
    return accelerator


def run_recipe(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Runs `main(argv)` and exits: 0 when all was done, 1 with one line for a mistake, 128 + signal when stopped."""
    logging.disable_progress_bar()  # ours say more than the bars of each file that is loaded
    try:
        main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Interrupted as error:
        print(error, file=sys.stderr)
        raise SystemExit(128 + error.signal) from None
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {error.strerror}: {error.filename or ''}", file=sys.stderr)
        raise SystemExit(1) from None
