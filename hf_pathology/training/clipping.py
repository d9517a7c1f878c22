"""Norms of gradients, all in one pass, and clipping by them; parameters may be sharded over processes (FSDP2)."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate


def named_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of `model` under the names of their parameters, where there are any."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@torch.no_grad()
def tensor_norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of each of `tensors`, (tensors,), on their device; the same on all processes for shards.

    However many tensors are sharded in one way, one sum over the processes serves them all.
    """
    if not tensors:
        return torch.zeros(0)
    norms = torch.stack(torch._foreach_norm([_local(tensor) for tensor in tensors])).float()
    alike: dict[tuple, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            alike.setdefault((tensor.device_mesh, tuple(tensor.placements)), []).append(index)
    for (mesh, placements), indices in alike.items():
        summed = [Partial() if placement.is_shard() else Replicate() for placement in placements]
        norms[indices] = DTensor.from_local(norms[indices].square(), mesh, summed).full_tensor().sqrt()
    return norms


@torch.no_grad()
def clip_gradients(
    gradients: Mapping[str, torch.Tensor],
    norms: Sequence[float],
    max_norm: float,
    scope: Literal["parameter", "model", "module"] = "parameter",
) -> None:
    """Scales gradients so that no norm is above `max_norm`, in place; 0 clips nothing.

    DINO, iBOT and HIPT clip parameter by parameter, not by the global norm; DINOv2 clips backbone and heads each by
    itself.

    Args:
        gradients: by name, whose first part is the module of the method.
        norms: of each of them, on the host, so that those below `max_norm` are not touched at all.
        scope: what is clipped by one norm: each `parameter`, the whole `model`, or each `module`.
    """
    if max_norm <= 0:
        return
    part_of = {"parameter": lambda name: name, "model": lambda name: "", "module": lambda name: name.split(".")[0]}[
        scope
    ]
    squares: dict[str, float] = {}
    for name, norm in zip(gradients, norms, strict=True):
        squares[part_of(name)] = squares.get(part_of(name), 0.0) + norm**2
    scales = {part: max_norm / (math.sqrt(square) + 1e-6) for part, square in squares.items()}
    too_long = [name for name in gradients if scales[part_of(name)] < 1.0]
    if too_long:
        torch._foreach_mul_(
            [_local(gradients[name]) for name in too_long], [scales[part_of(name)] for name in too_long]
        )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` that lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
