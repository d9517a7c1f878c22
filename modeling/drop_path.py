"""Stochastic depth for transformers' vision models, of one kind for all of them (Huang et al. 2016, arXiv 1603.09382)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class DropPath(nn.Module):
    """Drops a residual branch for whole samples with probability `rate`, and scales the kept ones by 1 / (1 - rate).

    In a packed batch (`packing.py`), whose samples follow each other in one row, `segments` says where they are.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.segments: Sequence[tuple[int, int]] = ()  # (samples, tokens of each), of a packed batch
        self.train()

    def train(self, mode: bool = True) -> "DropPath":
        # A tensor, so that one compiled layer serves all rates; no buffer, because transformers leaves those that are not
        # saved without a value when it loads a model.
        self.keep = torch.tensor(1.0 - self.rate)
        return super().train(mode)

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return branch
        samples = sum(count for count, _ in self.segments) or branch.shape[0]
        scale = (torch.rand(samples, device=branch.device) < self.keep) / self.keep  # (samples,)
        if self.segments:
            scale = torch.cat(
                [
                    part.repeat_interleave(tokens)
                    for part, (_, tokens) in zip(scale.split([count for count, _ in self.segments]), self.segments)
                ]
            )
            return branch * scale[None, :, None].to(branch.dtype)
        return branch * scale.view(-1, *(1,) * (branch.ndim - 1)).to(branch.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class BatchSubset(nn.Module):
    """Stochastic depth that saves the work: a branch is computed for a random part of the samples, `1 - rate` of them.

    Its output for those is scaled by the inverse of that part, and zero for the others (DINOv2, arXiv 2304.07193, section
    5). Placed where `DropPath` would be, it changes nothing itself: it chooses what the layer's attention and its
    feed-forward part are given, and puts their outputs back. The choice is without replacement, so a fixed number drops out.
    """

    def __init__(self, rate: float, branches: Sequence[nn.Module]):
        super().__init__()
        self.rate = rate
        self.segments: Sequence[tuple[int, int]] = ()  # (samples, tokens of each), of a packed batch
        self._chosen: tuple[torch.Tensor, int, torch.Tensor] | None = None  # rows, of how many, and their factors
        for branch in branches:
            branch.register_forward_pre_hook(self._choose, with_kwargs=True)
            branch.register_forward_hook(self._put_back)

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        return branch

    def _choose(
        self, branch: nn.Module, inputs: tuple, options: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if not branch.training:
            return None
        states, *others = inputs  # (samples, tokens, D); packed (1, tokens of all samples, D)
        segments = self.segments or [(states.shape[0], 1)]  # without segments a sample is one row
        rows, kept_segments, first = [], [], 0
        for samples, tokens in segments:
            kept = max(1, int(samples * (1 - self.rate)))
            chosen = torch.randperm(samples, device=states.device)[:kept, None] * tokens
            rows.append((first + chosen + torch.arange(tokens, device=states.device)).flatten())
            kept_segments.append((kept, tokens))
            first += samples * tokens
        # One factor for all segments would not be right: each keeps its own whole number of samples.
        scale = torch.cat(
            [
                states.new_full((kept * tokens,), samples / kept)
                for (samples, tokens), (kept, _) in zip(segments, kept_segments)
            ]
        )
        self._chosen = (torch.cat(rows), first, scale)
        if not self.segments:
            return (states[self._chosen[0]], *others), options
        if "segments" in options:
            options = {**options, "segments": tuple(kept_segments)}
        return (states[:, self._chosen[0]], *others), options

    def _put_back(self, branch: nn.Module, inputs: tuple, output: Any) -> Any:
        if not branch.training:
            return None
        (rows, count, scale), self._chosen = self._chosen, None
        states = output[0] if isinstance(output, tuple) else output
        if self.segments:
            whole = states.new_zeros((1, count, states.shape[-1]))
            whole = whole.index_copy(1, rows, states * scale[None, :, None].to(states.dtype))
        else:
            whole = states.new_zeros((count, *states.shape[1:]))
            whole = whole.index_copy(0, rows, states * scale[:, None, None].to(states.dtype))
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def add_drop_path(trunk: PreTrainedModel, rate: float, subset: bool = False) -> None:
    """Gives the layers of `trunk` stochastic depth: of a plain ViT rising linearly to `rate`, of a DINOv2 `rate` in all.

    Both are the rules of the original codes. A ViT layer's `dropout` sits on both of its residual branches and nowhere
    else, as the `drop_path` of a DINOv2 layer does, so replacing it is stochastic depth. Names in the state dict and the
    saved config stay as they are. Other trunks are left alone when their config has a `drop_path_rate`, which they follow
    by themselves; raises ValueError for a rate above 0 where a trunk has none of these.

    Args:
        rate: of the last layer, or of all.
        subset: by `BatchSubset` instead of `DropPath`.
    """
    layers = trunk_layers(trunk)
    places = [name for name in ("dropout", "drop_path") if layers and hasattr(layers[0], name)]
    if not places:
        if rate > 0 and (subset or not hasattr(trunk.config, "drop_path_rate")):
            raise ValueError(f"a {trunk.config.model_type} has no stochastic depth: set drop_path_rate to 0")
        return
    (place,) = places
    rates = torch.linspace(0, rate, len(layers), device="cpu").tolist() if place == "dropout" else [rate] * len(layers)
    for layer, layer_rate in zip(layers, rates):
        if layer_rate == 0:
            drop = nn.Identity()
        elif subset:
            drop = BatchSubset(layer_rate, [layer.attention, layer.mlp])
        else:
            drop = DropPath(layer_rate)
        setattr(layer, place, drop)


def trunk_layers(trunk: PreTrainedModel) -> Sequence[nn.Module]:
    """The transformer layers of `trunk`, first to last; none when it is no plain transformer."""
    for holder in (trunk, getattr(trunk, "encoder", None)):
        for name in ("layers", "layer"):
            layers = getattr(holder, name, None)
            if isinstance(layers, nn.ModuleList):
                return layers
    return ()
