"""Parameter groups, clipping and the scheduled numbers of the optimizer, as DINO and iBOT have them."""

from collections.abc import Iterable

import torch
from torch import nn


def parameter_groups(model: nn.Module) -> list[dict]:
    """Two groups for AdamW: the weights that decay, then those that do not (biases and one-dimensional ones)."""
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (undecayed if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Sets the learning rate of all groups and the weight decay of the first."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.param_groups[0]["weight_decay"] = weight_decay


@torch.no_grad()
def clip_each_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales each parameter's gradient by itself to a norm of at most `max_norm`; returns the norm of all, unclipped.

    DINO, iBOT and HIPT clip parameter by parameter, not by the global norm.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    norms = torch._foreach_norm(gradients)
    scales = [(max_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
    torch._foreach_mul_(gradients, scales)
    return torch.linalg.vector_norm(torch.stack(norms))
