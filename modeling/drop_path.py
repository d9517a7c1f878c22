"""Stochastic depth for transformers' plain ViT, which has none (Huang et al. 2016, arXiv 1603.09382)."""

import torch
from torch import nn
from transformers import ViTModel


class DropPath(nn.Module):
    """Drops a residual branch for whole samples with probability `rate`, and scales the kept ones by 1 / (1 - rate)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        kept = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        return branch * kept / keep

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def add_drop_path(vit: ViTModel, rate: float) -> None:
    """Gives the layers of `vit` stochastic depth, rising linearly from 0 in the first to `rate` in the last.

    A ViT layer's `dropout` sits on both of its residual branches and nowhere else, so replacing it is stochastic depth.
    Names in the state dict and the saved config stay as they are.
    """
    rates = torch.linspace(0, rate, len(vit.layers)).tolist()
    for layer, layer_rate in zip(vit.layers, rates):
        if not isinstance(layer.dropout, nn.Dropout | DropPath):
            raise TypeError(f"the ViT layer of this transformers release holds a {type(layer.dropout)} as its dropout")
        layer.dropout = DropPath(layer_rate)
