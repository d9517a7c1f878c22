"""The projection head of DINO and iBOT (Caron et al. 2021, arXiv 2104.14294; Zhou et al. 2022, arXiv 2111.07832)."""

from typing import Literal

import torch
from torch import nn


class WeightNormLinear(nn.Module):
    """A linear map without bias whose rows are `weight_g * weight_v / |weight_v|`.

    Args:
        in_dim, out_dim: sizes of the last dimension of input and output.
        unit_norm: fixes `weight_g` at 1, so that the outputs for unit inputs are cosines.
    """

    def __init__(self, in_dim: int, out_dim: int, unit_norm: bool):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.trunc_normal_(self.weight_v, std=0.02)
        if unit_norm:
            self.register_buffer("weight_g", torch.ones(out_dim, 1))
        else:
            self.weight_g = nn.Parameter(torch.ones(out_dim, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = nn.functional.normalize(self.weight_v, dim=1) * self.weight_g
        return nn.functional.linear(x, weight)


class ProjectionHead(nn.Module):
    """An MLP to a bottleneck, unit length, then a score for each of many prototypes.

    Class and patch tokens share the MLP. They share the prototypes too, unless `patch_out_dim` gives the patches their
    own. Used in two steps, so that the costly second one runs only where its result is needed:
    `head.prototypes(head.embed(tokens))`.

    Args:
        in_dim: size of the tokens.
        out_dim: number of prototypes K (of the class token).
        patch_out_dim: number of the patches' own prototypes, or None to share the class token's.
        hidden_dim, bottleneck_dim, layers: of the MLP; `layers` of 1 is one linear map. A bottleneck of 0 leaves out
            normalisation and weight norm: the MLP's last layer scores the prototypes.
        norm: "ln" or "bn" after each hidden layer (one module for all of them, as the original iBOT has it), or None.
        unit_norm: see `WeightNormLinear`; `norm_last_layer` in the original codes.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        patch_out_dim: int | None = None,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        norm: Literal["ln", "bn"] | None = None,
        unit_norm: bool = True,
    ):
        super().__init__()
        norm_layer = {None: None, "ln": nn.LayerNorm, "bn": TokenBatchNorm}[norm]
        shared_norm = norm_layer(hidden_dim) if norm_layer else None
        widths = [in_dim] + [hidden_dim] * (layers - 1)
        norms = [shared_norm] + [SameAs(shared_norm)] * (layers - 2) if shared_norm else []
        hidden: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(zip(widths, widths[1:])):
            hidden += [nn.Linear(width_in, width_out), *norms[i : i + 1], nn.GELU()]
        if bottleneck_dim > 0:
            self.mlp = nn.Sequential(*hidden, nn.Linear(widths[-1], bottleneck_dim))
            self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, unit_norm)
            self.patch_last_layer = (
                WeightNormLinear(bottleneck_dim, patch_out_dim, unit_norm) if patch_out_dim is not None else None
            )
        else:
            self.mlp = nn.Sequential(*hidden)
            self.last_layer = nn.Linear(widths[-1], out_dim)
            self.patch_last_layer = nn.Linear(widths[-1], patch_out_dim) if patch_out_dim is not None else None
        self.unit_length = bottleneck_dim > 0
        self.apply(self._init_linear)

    @staticmethod
    def _init_linear(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The bottleneck of `tokens` (..., in_dim): unit vectors (..., bottleneck_dim), normalised in float32."""
        bottleneck = self.mlp(tokens)
        return nn.functional.normalize(bottleneck.float(), dim=-1, eps=1e-12) if self.unit_length else bottleneck

    def prototypes(self, embedding: torch.Tensor) -> torch.Tensor:
        """Scores (..., K) of class tokens for every prototype."""
        return self.last_layer(embedding)

    def patch_prototypes(self, embedding: torch.Tensor) -> torch.Tensor:
        """Scores (..., K) of patch tokens for every prototype; linear in `embedding` when there is a bottleneck."""
        return (self.patch_last_layer or self.last_layer)(embedding)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over the last dimension, whatever stands before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


class SameAs(nn.Module):
    """Applies a module that stands elsewhere, whose weights must have one name only to be saved."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.modules_elsewhere = (module,)  # a tuple: not registered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.modules_elsewhere[0](x)
