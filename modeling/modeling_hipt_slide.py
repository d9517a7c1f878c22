"""HIPT's slide classifiers (Chen et al. 2022, arXiv 2206.02647): tiles make regions, and regions a slide."""

from math import isqrt
from typing import TYPE_CHECKING

import torch
from torch import nn

from .configuration_hipt_slide import HiptSlideConfig
from .gated_attention import GatedAttention
from .modeling_hipt import HiptRegionModel
from .modeling_slide_head import SlideHead, SlideOutput


if TYPE_CHECKING:  # transformers 5.9 copies from a local folder only the files that this one names itself
    from .cls_attention import watch_cls_attention  # noqa: F401
    from .configuration_hipt import HiptRegionConfig  # noqa: F401
    from .configuration_slide_head import SlideHeadConfig  # noqa: F401
    from .drop_path import trunk_layers  # noqa: F401
    from .position import use_dino_interpolation  # noqa: F401
    from .survival_loss import discrete_survival_loss  # noqa: F401
    from .trunk import make_trunk  # noqa: F401


class HiptForSlideClassification(SlideHead):
    """Classifies a slide by its regions, and these by their tiles.

    With the layers and weights of the published heads the logits are the same: `HIPT_LGP_FC` (a transformer over the tiles
    of a region, another over regions), `HIPT_GP_FC` (`region_tiles=1`: over the vectors of regions) and `HIPT_None_FC`
    (`local="attention"`). Batches of slides are padded; the published heads take one slide at a time.
    """

    config_class = HiptSlideConfig
    base_model_prefix = "hipt_slide"
    _supports_sdpa = True

    def __init__(self, config: HiptSlideConfig):
        super().__init__(config)
        width, dropout = config.hidden_size, config.dropout
        region_width = config.input_dim
        if config.region_tiles > 1:
            self.regions = TransformerRegions(config) if config.local == "transformer" else AttentionRegions(config)
            region_width = self.regions.width
        self.embed = nn.Sequential(nn.Linear(region_width, width), nn.ReLU(), nn.Dropout(dropout))
        if config.local == "transformer":
            layer = nn.TransformerEncoderLayer(width, config.num_attention_heads, width, dropout, batch_first=True)
            self.transformer = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)
        self.attention = GatedAttention(width, dropout=dropout)
        self.rho = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        coords: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SlideOutput:
        """Logits and tile scores of a batch of bags.

        Args:
            features: (B, N, D), the tiles of one region after those of the other; row by row within a region. What stands
                in padded rows does not matter, be it NaN.
            mask: bool (B, N), True = real tile; a region without any does not count. All when None.
            coords: (B, N, 2), taken for the signature that all heads share; regions have no positions in HIPT.
            labels: see `slide_loss`.

        `tile_scores` are those of regions, shared out equally among the tiles of each, or, with `local="attention"`,
        by their own attention. Raises ValueError for a bag without a real tile, or without whole regions.
        """
        features, mask = self.standardised(features, mask)
        tiles = self.config.region_tiles
        if features.shape[1] % tiles:
            raise ValueError(f"a bag of {features.shape[1]} tiles is no number of whole regions of {tiles}")
        seen = mask.unflatten(1, (-1, tiles))  # (B, M, T)
        there = seen.any(dim=2)  # (B, M)
        if tiles == 1:
            regions, shares = features, seen.to(features.dtype)
        else:
            regions, shares = self._regions(features.unflatten(1, (-1, tiles)), seen, there)
        hidden = self.embed(regions)  # (B, M, H)
        if self.config.local == "transformer":
            hidden = self.transformer(hidden, src_key_padding_mask=~there)
            hidden = hidden.masked_fill(~there.unsqueeze(-1), 0.0)
        scores = self.attention(hidden, there)  # (B, M)
        slide_embedding = self.rho(torch.einsum("bm,bmh->bh", scores, hidden))
        logits = self.classifier(slide_embedding)  # (B, C)
        return SlideOutput(
            loss=self.loss_of(logits, labels),
            logits=logits,
            slide_embedding=slide_embedding,
            tile_scores=(scores.unsqueeze(-1) * shares).flatten(1),
        )

    def _regions(
        self, tiles: torch.Tensor, seen: torch.Tensor, there: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors of the regions (B, M, W) and the tiles' shares in them (B, M, T); zeros for what is not there."""
        vectors, shares = self.regions(tiles[there], seen[there])
        regions = vectors.new_zeros(*there.shape, vectors.shape[-1])
        all_shares = shares.new_zeros(seen.shape)
        regions[there], all_shares[there] = vectors, shares
        return regions, all_shares


class TransformerRegions(nn.Module):
    """A region is the class token of HIPT's second level."""

    def __init__(self, config: HiptSlideConfig):
        super().__init__()
        self.encoder = HiptRegionModel(config.region_config)
        self.width = config.region_config.hidden_size
        self.edge = isqrt(config.region_tiles)
        if self.edge**2 != config.region_tiles:
            raise ValueError(f"{config.region_tiles} tiles form no square region")
        self.is_frozen = config.freeze_regions
        self.encoder.requires_grad_(not self.is_frozen)

    def train(self, mode: bool = True) -> "TransformerRegions":
        """Frozen weights do not train, nor does what depends on the mode."""
        return super().train(mode and not self.is_frozen)

    def forward(self, tiles: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors (R, W) of regions of `tiles` (R, T, D), and what share each of the tiles `seen` (R, T) has in them."""
        grid = tiles.transpose(1, 2).unflatten(2, (self.edge, self.edge))  # (R, D, h, w)
        mask = None if seen.all() else seen.unflatten(1, (self.edge, self.edge))
        return self.encoder(grid, mask).pooler_output, seen / seen.sum(dim=1, keepdim=True)


class AttentionRegions(nn.Module):
    """A region is the attention-weighted mean of its embedded tiles."""

    def __init__(self, config: HiptSlideConfig):
        super().__init__()
        self.width = config.hidden_size
        self.embed = nn.Sequential(nn.Linear(config.input_dim, self.width), nn.ReLU(), nn.Dropout(config.dropout))
        self.attention = GatedAttention(self.width, dropout=config.dropout)

    def forward(self, tiles: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `TransformerRegions`."""
        hidden = self.embed(tiles)
        weights = self.attention(hidden, seen)  # (R, T)
        return torch.einsum("rt,rth->rh", weights, hidden), weights
