"""How the output of an encoder becomes one vector per tile: part of a release, read from its image processor."""

from typing import Literal, get_args

import torch


Pooling = Literal["cls", "mean", "cls+mean", "gap"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


def pooling_of(stated: str | None, encoder: str, model_type: str) -> Pooling:
    """The rule that the caller, the release or a preset states, else what the architecture implies.

    Raises ValueError for a rule that does not exist, or when nothing says how to pool.
    """
    if stated is not None:
        if stated not in POOLINGS:
            raise ValueError(f"{encoder} asks for pooling {stated!r}: known are {', '.join(POOLINGS)}")
        return stated
    if model_type in ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "deit", "beit", "vit_msn", "hipt"):
        return "cls"
    if model_type in ("resnet", "convnext", "convnextv2", "regnet"):
        return "gap"
    raise ValueError(
        f"{encoder} ({model_type}) does not say how to pool: pass --pooling, one of {', '.join(POOLINGS)}"
    )


def pool(last_hidden_state: torch.Tensor, pooling: Pooling, prefix_tokens: int = 1) -> torch.Tensor:
    """One vector per tile, (B, D), or (B, 2D) for "cls+mean".

    Args:
        last_hidden_state: (B, prefix_tokens + patches, D) of a transformer, or (B, D, h, w) of a convolutional network.
        pooling: "cls" takes the first token, "mean" the mean of the patch tokens, "cls+mean" both side by side, "gap"
            the mean over the map.
        prefix_tokens: the class token and registers that stand before the patches.
    """
    if (last_hidden_state.ndim == 4) != (pooling == "gap"):
        raise ValueError(f"pooling {pooling!r} does not fit an output of shape {tuple(last_hidden_state.shape)}")
    if pooling == "gap":
        return last_hidden_state.mean(dim=(2, 3))
    cls, patches = last_hidden_state[:, 0], last_hidden_state[:, prefix_tokens:]
    if pooling == "cls":
        return cls
    if pooling == "mean":
        return patches.mean(dim=1)
    return torch.cat([cls, patches.mean(dim=1)], dim=-1)
