"""DeepAttnMISL (Yao et al. 2020, arXiv 2009.11169): a slide is its kinds of tiles, and each kind has layers of its own."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .configuration_deep_attn_misl import DeepAttnMislConfig
from .gated_attention import GatedAttention
from .modeling_slide_head import SlideHead, SlideOutput


if TYPE_CHECKING:  # transformers 5.9 copies from a local folder only the files that this one names itself
    from .configuration_slide_head import SlideHeadConfig  # noqa: F401
    from .survival_loss import discrete_survival_loss  # noqa: F401


class DeepAttnMislForSlideClassification(SlideHead):
    """Classifies a slide by the attention-weighted mean of its clusters, each the mean of its tiles.

    A tile belongs to the nearest of the buffer `cluster_centres` (K, D), which a recipe sets, and which are saved with the
    weights. With the layers and weights of HIPT's `MIL_Cluster_FC`, and its clusters, the logits are the same, but that
    clusters without tiles are not attended to, as in the paper; there they count as zeros. Features are standardised before
    they are compared with the centres.
    """

    config_class = DeepAttnMislConfig
    base_model_prefix = "deep_attn_misl"

    def __init__(self, config: DeepAttnMislConfig):
        super().__init__(config)
        width, dropout = config.hidden_dim, config.dropout
        self.register_buffer("cluster_centres", torch.zeros(config.num_clusters, config.input_dim))
        self.clusters = nn.ModuleList(
            nn.Sequential(layer(config.input_dim, width, dropout), layer(width, width, dropout))
            for _ in range(config.num_clusters)
        )
        self.embed = layer(width, width, dropout)
        self.attention = GatedAttention(width, dropout=dropout, hidden_dim=config.attention_dim)
        self.rho = layer(width, config.attention_dim, dropout)
        self.classifier = nn.Linear(config.attention_dim, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.zeros_(self.cluster_centres)

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        coords: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cluster_of: torch.Tensor | None = None,
    ) -> SlideOutput:
        """Logits and tile scores of a batch of bags.

        Args:
            features: (B, N, D). What stands in padded rows does not matter, be it NaN.
            mask: bool (B, N), True = real tile; None when every tile is.
            coords: (B, N, 2), taken for the signature that all heads share.
            labels: see `slide_loss`.
            cluster_of: int (B, N) below K, the cluster of each tile; by `cluster_centres` when None.

        `tile_scores` are those of clusters, shared out equally among the tiles of each. Raises ValueError for a bag without
        a real tile.
        """
        features, mask = self.standardised(features, mask)
        if cluster_of is None:
            cluster_of = torch.cdist(features, self.cluster_centres.expand(len(features), -1, -1)).argmin(dim=-1)
        kinds = torch.arange(self.config.num_clusters, device=features.device)
        members = (cluster_of.unsqueeze(1) == kinds[:, None]) & mask.unsqueeze(1)  # (B, K, N)
        shares = members / members.sum(dim=2, keepdim=True).clamp(min=1)  # (B, K, N)
        hidden = self.embed(self._means(features, members, shares))  # (B, K, H)
        scores = self.attention(hidden, members.any(dim=2))  # (B, K)
        slide_embedding = self.rho(torch.einsum("bk,bkh->bh", scores, hidden))
        logits = self.classifier(slide_embedding)  # (B, C)
        return SlideOutput(
            loss=self.loss_of(logits, labels),
            logits=logits,
            slide_embedding=slide_embedding,
            tile_scores=torch.einsum("bk,bkn->bn", scores, shares),
        )

    def _means(self, features: torch.Tensor, members: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The mean over the embedded tiles of each cluster (B, K, H); zeros where there are none."""
        means = []
        for kind, embed in enumerate(self.clusters):
            bag, tile = members[:, kind].nonzero(as_tuple=True)
            parts = shares[bag, kind, tile].unsqueeze(-1) * embed(features[bag, tile])  # (n, H)
            means.append(parts.new_zeros(len(features), parts.shape[-1]).index_add(0, bag, parts))
        return torch.stack(means, dim=1)


def layer(dim: int, next_dim: int, dropout: float) -> nn.Sequential:
    """A linear layer from `dim` to `next_dim`, ReLU and dropout."""
    return nn.Sequential(nn.Linear(dim, next_dim), nn.ReLU(), nn.Dropout(dropout))
