"""The encoder on the way: exported and judged on the main process, without a trace in the training."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from .options import TrainingOptions
from .random_state import undisturbed


class EncoderOnTheWay:
    """Lets the main process export and judge `method.encoder`, with whole weights, while the training stands still.

    Where the weights are sharded (FSDP2) a copy made before sharding, filled with the gathered weights, stands in the
    encoder's place meanwhile.

    Args:
        method: not yet prepared by `accelerator`.
        folder: for the exports.
        export, judge: see `TrainingLoop`.
    """

    def __init__(
        self,
        method: nn.Module,
        accelerator: Accelerator,
        options: TrainingOptions,
        folder: Path,
        export: Callable[[Path], None] | None,
        judge: Callable[[nn.Module], dict[str, float]] | None,
    ):
        self.method, self.accelerator, self.options = method, accelerator, options
        self.folder, self.export, self.judge = folder, export, judge
        self._copy = None
        if accelerator.distributed_type == DistributedType.FSDP:
            self._copy = copy.deepcopy(method.encoder_part).requires_grad_(False)

    def is_judged(self, step: int) -> bool:
        """Whether the encoder is judged after `step`."""
        return self.judge is not None and self.options.ends(step, self.options.judge_every)

    def look(self, step: int) -> dict[str, float]:
        """Exports and judges the encoder when it is time to after `step`; what the judge said, on the main process."""
        numbers: dict[str, float] = {}
        exports = self.export is not None and self.options.ends(step, self.options.export_every)
        if not (exports or self.is_judged(step)):
            return numbers
        with self._standing_still():
            if self.accelerator.is_main_process:
                if exports:
                    self.export(self.folder / f"step_{step + 1:08d}")
                if self.is_judged(step):
                    numbers = {name: float(value) for name, value in self.judge(self.method.encoder).items()}
        return numbers

    def make_whole(self) -> None:
        """Gives `method.encoder` whole weights for good, on the main process: the training is over."""
        if self._copy is not None:
            self._gather()
            self._replace(self.method.encoder_part, self._copy)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        method, sharded = self.method, None
        if self._copy is not None:
            self._gather()
            sharded = method.encoder_part
            self._replace(sharded, self._copy)
        method.eval()
        try:
            with undisturbed(self.accelerator.device), torch.no_grad():
                yield
        finally:
            if self._copy is not None:
                self._replace(self._copy, sharded)
            method.train()
        self.accelerator.wait_for_everyone()

    def _gather(self) -> None:
        """Fills the copy with the whole weights, on the main process; called by all."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.method.encoder_part, options=whole)
        if self.accelerator.is_main_process:
            self._copy.load_state_dict(weights)
            self._copy.to(self.accelerator.device)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        name = next(name for name, module in self.method.named_modules() if module is old)
        parent, _, own = name.rpartition(".")
        setattr(self.method.get_submodule(parent), own, new)
