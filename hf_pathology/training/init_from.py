"""A new run whose weights are those of a checkpoint, with everything else at its beginning."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..errors import UserError
from .checkpoint import step_folders
from .integrity import INDEX, damage


WEIGHTS = "model.safetensors"


def start_from(method: nn.Module, place: str | Path) -> Path:
    """Loads the weights and buffers of a checkpoint into `method`, and returns the checkpoint's path.

    `place` is a checkpoint, or the folder of a run, whose last whole checkpoint is taken. A method whose buffers follow
    the step is told by its `restart()`, if it has one. Raises UserError when there is none, or when it has other weights.
    """
    path = checkpoint_at(Path(place))
    weights = load_file(path / WEIGHTS)
    _require_same(method.state_dict(), weights, path)
    method.load_state_dict(weights)
    if hasattr(method, "restart"):
        method.restart()
    return path


def checkpoint_at(place: Path, asked: str = "init_from") -> Path:
    """The checkpoint at `place`, or the last whole one of the run there.

    Raises UserError, which begins with what was `asked` for, when its weights cannot be had.
    """
    candidates = [place] if (place / INDEX).is_file() else step_folders(place / "checkpoints")
    if not candidates:
        raise UserError(f"{asked} {place} is neither a checkpoint nor the folder of a run with checkpoints")
    for path in reversed(candidates):
        if not damage(path, only=WEIGHTS):
            if not (path / WEIGHTS).is_file():
                raise UserError(
                    f"{asked} {path} holds shards: first run `accelerate merge-weights {path}/pytorch_model_fsdp_0 {path}`"
                )
            return path
    raise UserError(f"{asked} {place}: {', '.join(path.name for path in candidates)} is damaged")


def _require_same(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], path: Path) -> None:
    differences = [f"{name} is missing there" for name in own if name not in given]
    differences += [f"{name} is not in this model" for name in given if name not in own]
    differences += [
        f"{name} is {tuple(given[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if name in given and own[name].shape != given[name].shape
    ]
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(f"init_from {path} has other weights than this model: {', '.join(differences[:3])}{more}")
