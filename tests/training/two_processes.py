"""What two processes make of runs, for `test_layouts.py`: torchrun --nproc_per_node 2 two_processes.py FOLDER

accelerate shards (FSDP2) on GPUs only: on a CPU it falls back to DDP. Its own code for sharding is used here all the same,
on gloo, by telling it what it would find on two GPUs.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from launch_settings import launch_environment
from safetensors.torch import save_file
from small_runs import METHODS, Parts, method, small_loop
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from hf_pathology.training.start import leave_precision_to_autocast


SAME = {"optimizer": "sgd", "batch_scaling": "none", "learning_rate": 0.1, "steps": 3}  # rounding stays what it is
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def accelerator_of(kind: str, precision: str = "no") -> Accelerator:
    """The accelerator of this process: `ddp`, or `sharded` as recipes/accelerate/fsdp2.yaml has it."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    if kind == "sharded":
        for state in (accelerator.state, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        os.environ.update({key: value for key, value in launch_environment("fsdp2").items() if key.startswith("FSDP")})
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if precision != "no":
            accelerator.state.fsdp_plugin.set_mixed_precision(precision)  # as accelerate does
            leave_precision_to_autocast(accelerator)
    return accelerator


class Pair:
    """This process of the two, which trains on its half of each batch."""

    def __init__(self, folder: Path):
        self.folder, self.rank = folder, accelerator_of("ddp").process_index

    def loop(self, name: str, kind: str, model: torch.nn.Module, *, broken=(), precision="no", **changes):
        """The loop of the run `name`, whose batches `broken` are not finite on the second process."""
        batches = Parts(2, [self.rank], broken=broken if self.rank == 1 else ())
        accelerator = accelerator_of(kind, precision)
        return small_loop(self.folder / name, batches, model, accelerator=accelerator, **{**SAME, **changes})

    def keep(self, model: torch.nn.Module, name: str) -> None:
        """Writes the whole weights of `model`."""
        weights = get_model_state_dict(model, options=WHOLE)
        if self.rank == 0:
            save_file({key: value.contiguous() for key, value in weights.items()}, self.folder / f"{name}.safetensors")

    def train(self, name: str, kind: str, model: torch.nn.Module, **changes) -> None:
        self.keep(self.loop(name, kind, model, **changes).run(), name)


def main(folder: Path) -> None:
    pair = Pair(folder)
    for kind in ("ddp", "sharded"):
        for name in METHODS:
            pair.train(f"{name} {kind}", kind, method(name, drop_path_rate=0.0))
        pair.train(f"bf16 {kind}", kind, method(drop_path_rate=0.0), precision="bf16")
        # In two micro-batches of each process.
        loop = pair.loop(f"accumulated {kind}", kind, method(drop_path_rate=0.0), accumulation=2, batch_size=2)
        loop.loader = Parts(4, [pair.rank, 2 + pair.rank])
        pair.keep(loop.run(), f"accumulated {kind}")
        # A batch that is not finite, on the second process alone.
        pair.train(f"broken {kind}", kind, method(drop_path_rate=0.0), broken=[1])
        # With dropping, AdamW and a checkpoint on the way: straight, and as if killed after the second step.
        hot = {"optimizer": "adamw", "learning_rate": 1e-3, "steps": 4}
        pair.train(f"straight {kind}", kind, method(), **hot)
        pair.loop(f"cut {kind}", kind, method(), **hot).run()
        if pair.rank == 0:
            shutil.rmtree(folder / f"cut {kind}" / "checkpoints" / "step_00000004")
        torch.distributed.barrier()
        torch.manual_seed(99)
        resumed = pair.loop(f"cut {kind}", kind, method(), **hot)
        assert resumed.step == 2
        pair.keep(resumed.run(), f"cut {kind}")
    # A run that one process has begun.
    pair.train("begun by one", "ddp", method(drop_path_rate=0.0), steps=4)
    watched(pair, "ibot")
    watched(pair, "mae")
    torch.distributed.destroy_process_group()


def watched(pair: Pair, name: str) -> None:
    """Exports and judges the sharded encoder on the way, and keeps what the main process then had."""
    model = method(name, drop_path_rate=0.0)

    def judge(encoder):
        weight = encoder.layernorm.weight.detach()
        features = encoder(torch.ones(1, 3, 32, 32)).last_hidden_state
        assert type(weight) is torch.Tensor and not features.requires_grad
        return {"weight": float(weight.sum()), "features": float(features.sum())}

    def export(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.encoder.state_dict(), path)

    hooks = {"judge": judge, "export": export}
    pair.loop(f"watched {name}", "sharded", model, hooks=hooks, judge_every=1, export_every=2).run()
    if pair.rank == 0:
        export(pair.folder / f"watched {name}" / "encoder")
    torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
