"""Gated-attention multiple-instance learning (Ilse et al. 2018, arXiv 1802.04712): a head over the tiles of a slide."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_abmil import AbmilConfig
from .gated_attention import GatedAttention
from .modeling_slide_head import SlideHead, SlideOutput


if TYPE_CHECKING:  # transformers 5.9 copies from a local folder only the files that this one names itself
    from .configuration_slide_head import SlideHeadConfig  # noqa: F401
    from .survival_loss import discrete_survival_loss  # noqa: F401


class AbmilForSlideClassification(SlideHead):
    """Classifies a slide by the attention-weighted mean of its embedded tiles, as Phikon's benchmarks do.

    Layers and default initialisation are those of HistoSSLscaling's `ABMIL`: its heads give the same logits here.
    """

    config_class = AbmilConfig
    base_model_prefix = "abmil"

    def __init__(self, config: AbmilConfig):
        super().__init__(config)
        self.embed = perceptron([config.input_dim, *config.tile_hidden_dims, config.attention_dim], nn.Sigmoid())
        self.attention = GatedAttention(config.attention_dim, config.attention_temperature)
        self.classifier = perceptron(
            [config.attention_dim, *config.mlp_hidden_dims, config.num_labels],
            ACT2FN[config.mlp_activation],
            config.dropout,
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation, as in HistoSSLscaling; transformers' would draw from N(0, 0.02)."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        coords: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SlideOutput:
        """Logits and tile scores of a batch of bags.

        Args:
            features: (B, N, D). What stands in padded rows does not matter, be it NaN.
            mask: bool (B, N), True = real tile; None when every tile is.
            coords: (B, N, 2), taken for the signature that all heads share; attention over tiles has no use for it.
            labels: see `slide_loss`.

        Raises ValueError for a bag without a real tile.
        """
        features, mask = self.standardised(features, mask)
        hidden = self.embed(features)  # (B, N, H)
        tile_scores = self.attention(hidden, mask)  # (B, N)
        slide_embedding = torch.einsum("bn,bnh->bh", tile_scores, hidden)
        logits = self.classifier(slide_embedding)  # (B, C)
        return SlideOutput(
            loss=self.loss_of(logits, labels),
            logits=logits,
            slide_embedding=slide_embedding,
            tile_scores=tile_scores,
        )


def perceptron(dims: list[int], activation: nn.Module, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers through the widths `dims`, with `activation` and dropout after each but the last."""
    layers: list[nn.Module] = []
    for dim, next_dim in zip(dims[:-2], dims[1:-1]):
        layers += [nn.Linear(dim, next_dim), activation, nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1]))
