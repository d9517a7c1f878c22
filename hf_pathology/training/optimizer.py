"""Parameter groups, the optimizer over them, and the scheduled numbers of each group."""

from typing import Literal

import torch
from torch import nn

from ..errors import UserError
from .lars import Lars


def parameter_groups(model: nn.Module, layer_decay: float = 1.0, patch_embedding_rate: float = 1.0) -> list[dict]:
    """Groups of one `rate`, a factor of the learning rate, whose weights are `decayed`, or not (biases and 1-D ones).

    Those that decay come first. The split is that of DINO; the rates are those of DINOv2: `layer_decay ** (L + 1 - depth)`,
    with the depth that the method's `depths()` gives (0 for embeddings, L + 1 for what lies above the trunk and for what it
    does not name), and `patch_embedding_rate` times that for the patch embedding. Raises UserError for a decay of a method
    without `depths()`.
    """
    depths = _depths(model) if layer_decay != 1.0 else {}
    above = max(depths.values(), default=0)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = layer_decay ** (above - depths.get(name, above))
            rate *= patch_embedding_rate if "patch_embeddings" in name else 1.0
            decayed = parameter.ndim != 1 and not name.endswith(".bias")
            groups.setdefault((decayed, rate), []).append(parameter)
    return [
        {"params": groups[decayed, rate], "rate": rate, "decayed": decayed}
        | ({} if decayed else {"weight_decay": 0.0})
        for decayed, rate in sorted(groups, reverse=True)
    ]


def make_optimizer(
    groups: list[dict],
    kind: Literal["adamw", "sgd", "lars"] = "adamw",
    *,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """The optimizer of `kind` over the parameter groups; its rates are set before each step by `set_rates`.

    `momentum` is of SGD and LARS, `betas` of AdamW, whose fused kernel reads and writes each weight once, on the CPU too.
    """
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum, foreach=True)
    return Lars(groups, momentum=momentum)


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Sets the learning rate of all groups, each times its own factor, and the weight decay of those that decay."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def _depths(model: nn.Module) -> dict[str, int]:
    if not hasattr(model, "depths"):
        raise UserError(
            f"layer_decay needs the depth of each weight, which {type(model).__name__} does not say: set it to 1"
        )
    return model.depths()
