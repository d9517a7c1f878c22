"""Steps that are not taken because the loss or a gradient is not finite: what they must not leave behind, and the cause."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..atomic import write_json
from ..errors import UserError


class Refusals:
    """Counts the steps in a row that were not taken, and keeps the names of their tiles.

    Args:
        method: what is trained. The running statistics of its batch norms, which the forward pass moves, go back to what
            they were before such a step.
        folder: gets one file of tiles for each such step and rank.
        most: so many in a row end the run.
    """

    def __init__(self, method: nn.Module, folder: Path, most: int):
        self.folder, self.most = folder, most
        self.in_a_row = 0
        norms = [module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept = [buffer.clone() for buffer in self._statistics]

    @torch.no_grad()
    def step_was_taken(self) -> None:
        """Takes note of the statistics to go back to."""
        self.in_a_row = 0
        for kept, buffer in zip(self._kept, self._statistics):
            kept.copy_(buffer)

    @torch.no_grad()
    def refuse(self, step: int, rank: int, what: str, tiles: list[dict[str, Any]]) -> None:
        """Undoes what the forward passes did to statistics, and writes the tiles of the step.

        Raises UserError when it is the last of too many in a row. `what` was not finite.
        """
        self.in_a_row += 1
        for kept, buffer in zip(self._kept, self._statistics):
            buffer.copy_(kept)
        write_json(self.folder / f"step_{step:08d}_rank_{rank}.json", [as_json(batch) for batch in tiles])
        if self.in_a_row >= self.most:
            raise UserError(
                f"the {what} was not finite {self.in_a_row} steps in a row, last at step {step}: the tiles are in "
                f"{self.folder}; lower --learning_rate, or train without mixed precision"
            )


def as_json(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with lists for its tensors."""
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
