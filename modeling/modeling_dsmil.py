"""Dual-stream multiple-instance learning (Li et al. 2021, arXiv 2011.08939): the most telling tile asks for others like it."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .configuration_dsmil import DsmilConfig
from .modeling_slide_head import SlideHead, SlideOutput


if TYPE_CHECKING:  # transformers 5.9 copies from a local folder only the files that this one names itself
    from .configuration_slide_head import SlideHeadConfig  # noqa: F401
    from .survival_loss import discrete_survival_loss  # noqa: F401


class DsmilForSlideClassification(SlideHead):
    """Classifies tiles, and for each class attends to tiles that are like the one which shows it most.

    With the layers and weights of HIPT's `MILNet(FCLayer, BClassifier)` the logits are the same; that takes one slide at a
    time.
    """

    config_class = DsmilConfig
    base_model_prefix = "dsmil"

    def __init__(self, config: DsmilConfig):
        super().__init__(config)
        self.tile_classifier = nn.Linear(config.input_dim, config.num_labels)
        self.query = nn.Linear(config.input_dim, config.query_dim)
        self.value = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(config.input_dim, config.input_dim))
        self.classifier = nn.Conv1d(config.num_labels, config.num_labels, kernel_size=config.input_dim)
        self.post_init()

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        coords: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SlideOutput:
        """Logits, scores and logits of tiles of a batch of bags.

        Args:
            features: (B, N, D). What stands in padded rows does not matter, be it NaN.
            mask: bool (B, N), True = real tile; None when every tile is.
            coords: (B, N, 2), taken for the signature that all heads share.
            labels: see `slide_loss`.

        `logits` are the mean of those of both streams, `slide_embedding` (B, C * D) has a vector for each class, and
        `tile_scores` are the mean of the classes' attention. Raises ValueError for a bag without a real tile.
        """
        features, mask = self.standardised(features, mask)
        tile_logits = self.tile_classifier(features)  # (B, N, C)
        strongest, critical = tile_logits.masked_fill(~mask.unsqueeze(-1), float("-inf")).max(dim=1)  # (B, C)
        queries = self.query(features)  # (B, N, Q)
        asking = queries.gather(1, critical.unsqueeze(-1).expand(-1, -1, queries.shape[-1]))  # (B, C, Q)
        alike = torch.einsum("bnq,bcq->bcn", queries, asking) / queries.shape[-1] ** 0.5
        attention = alike.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(dim=-1)  # (B, C, N)
        slide = attention @ self.value(features)  # (B, C, D)
        logits = (self.classifier(slide).squeeze(-1) + strongest) / 2
        return SlideOutput(
            loss=self.loss_of(logits, labels),
            logits=logits,
            slide_embedding=slide.flatten(1),
            tile_scores=attention.mean(dim=1),
            tile_logits=tile_logits,
        )
