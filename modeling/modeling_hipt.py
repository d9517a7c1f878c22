"""HIPT: a transformer over the features that a transformer has of a region's tiles (Chen et al. 2022, arXiv 2206.02647)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ViTModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .cls_attention import watch_cls_attention
from .configuration_hipt import HiptConfig, HiptRegionConfig
from .position import use_dino_interpolation
from .trunk import has_class_token, make_trunk, trunk_tokens, trunk_width


if TYPE_CHECKING:  # transformers 5.9 copies from a local folder only the files that this one names itself
    from .drop_path import trunk_layers  # noqa: F401


class HiptRegionModel(PreTrainedModel):
    """The second level: a ViT of which each patch is a tile, embedded from its features by a linear layer and GELU."""

    config_class = HiptRegionConfig
    base_model_prefix = "hipt_region"
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: HiptRegionConfig):
        super().__init__(config)
        self.vit = ViTModel(config.vit_config(), add_pooling_layer=False)
        patches = self.vit.embeddings.patch_embeddings
        patches.projection = nn.Sequential(patches.projection, nn.GELU())
        if config.dino_interpolation:
            use_dino_interpolation(self.vit)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves every module as its constructor made it: by transformers' rule for a ViT."""

    def get_input_embeddings(self) -> None:
        """None: no table of embeddings is shared with an output."""

    @property
    def embeddings(self) -> nn.Module:
        return self.vit.embeddings

    @property
    def layers(self) -> nn.ModuleList:
        return self.vit.layers

    @property
    def layernorm(self) -> nn.Module:
        return self.vit.layernorm

    def forward(
        self, features: torch.Tensor, mask: torch.Tensor | None = None, **_: bool
    ) -> BaseModelOutputWithPooling:
        """The tokens of regions, the class token first, then the tiles row by row; `pooler_output` is the class token.

        Args:
            features: of the tiles, (B, D, h, w), any h and w.
            mask: bool (B, h, w), True for the tiles that there are; the others are not attended to. All when None.
        """
        tokens = self.vit.embeddings(features, interpolate_pos_encoding=True)  # (B, 1 + h * w, hidden size)
        attention_mask = None
        if mask is not None:
            seen = F.pad(mask.flatten(1), (1, 0), value=True)  # (B, 1 + h * w)
            attention_mask = torch.zeros(seen.shape, dtype=tokens.dtype, device=tokens.device)
            attention_mask = attention_mask.masked_fill(~seen, torch.finfo(tokens.dtype).min)[:, None, None]
        for layer in self.vit.layers:
            tokens = layer(tokens, attention_mask)
        tokens = self.vit.layernorm(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens[:, 0])


@dataclass
class HiptOutput(ModelOutput):
    """What HIPT says of B regions of h x w tiles.

    Attributes:
        last_hidden_state: the tokens of the region level, (B, 1 + h * w, hidden size), the class token first.
        pooler_output: the class token of the region level, "CLS-4K", (B, hidden size).
        tile_features: the class tokens of the tiles, (B, D, h, w); zeros where the mask is False.
        tile_mean: their mean over the tiles that there are, (B, D); zeros for a region without any.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    tile_features: torch.Tensor | None = None
    tile_mean: torch.Tensor | None = None


@dataclass
class HiptAttention(ModelOutput):
    """What the class tokens look at in their last layers; a row sums to 1 with what went to the class token itself.

    Attributes:
        tiles: of the tile level, (B, h, w, heads, h', w') for h' x w' patches; zeros where the mask is False.
        regions: of the region level, (B, heads, h, w).
    """

    tiles: torch.Tensor | None = None
    regions: torch.Tensor | None = None


class HiptModel(PreTrainedModel):
    """Encodes regions: each tile by the tile encoder, then the grid of their class tokens by the region encoder."""

    config_class = HiptConfig
    base_model_prefix = "hipt"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: HiptConfig):
        super().__init__(config)
        self.tile_encoder = make_trunk(config.tile_config)
        if not has_class_token(self.tile_encoder):
            raise ValueError(
                f"a {config.tile_config.model_type} has no class token: take a vit or dinov2 for the tiles"
            )
        width = trunk_width(config.tile_config)
        if config.region_config.input_size != width:
            raise ValueError(
                f"the region encoder takes features of length {config.region_config.input_size}, but those of the tile "
                f"encoder have {width}"
            )
        self.region_encoder = HiptRegionModel(config.region_config)
        # transformers finds the parts of a model by the identity of their configurations.
        self.config.tile_config, self.config.region_config = self.tile_encoder.config, self.region_encoder.config
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves every module as its constructor made it."""

    def get_input_embeddings(self) -> None:
        """None: no table of embeddings is shared with an output."""

    def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor | None = None) -> HiptOutput:
        """The features of regions.

        Args:
            pixel_values: normalised pixels (B, 3, H, W) of any size; see `HiptConfig.fit`.
            mask: bool (B, h, w), True for the tiles to be encoded, as tissue; the others are neither encoded nor
                attended to. All when None.

        Raises ValueError when a region is smaller than a tile and "crop" leaves nothing of it, or the mask is of
        another grid.
        """
        tiles = self.tiles_of(pixel_values)
        shown = self._shown(tiles, mask)
        features = tiles.new_zeros((*shown.shape, trunk_width(self.config.tile_config)), dtype=self.dtype)
        for places, encoded in self._encode(tiles, shown):
            features[places] = encoded.to(features.dtype)
        grid = features.permute(0, 3, 1, 2)  # (B, D, h, w)
        regions = self.region_encoder(grid, mask)
        mean = features.sum(dim=(1, 2)) / shown.sum(dim=(1, 2)).clamp(min=1)[:, None]
        return HiptOutput(
            last_hidden_state=regions.last_hidden_state,
            pooler_output=regions.pooler_output,
            tile_features=grid,
            tile_mean=mean,
        )

    @torch.no_grad()
    def attention(self, pixel_values: torch.Tensor, mask: torch.Tensor | None = None) -> HiptAttention:
        """What the class tokens of both levels look at; the arguments are those of `forward`."""
        tiles = self.tiles_of(pixel_values)
        shown, config = self._shown(tiles, mask), self.config.tile_config
        features = tiles.new_zeros((*shown.shape, config.hidden_size), dtype=self.dtype)
        edge = self.config.tile_size // config.patch_size
        maps = features.new_zeros((*shown.shape, config.num_attention_heads, edge, edge), dtype=torch.float32)
        with watch_cls_attention(self.tile_encoder) as noted:
            for places, encoded in self._encode(tiles, shown):
                features[places] = encoded.to(features.dtype)
                maps[places] = noted.rows[..., -(edge**2) :].unflatten(-1, (edge, edge))
        with watch_cls_attention(self.region_encoder) as noted:
            self.region_encoder(features.permute(0, 3, 1, 2), mask)
        return HiptAttention(tiles=maps, regions=noted.rows[..., 1:].unflatten(-1, shown.shape[1:]))

    def tiles_of(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The tiles of regions (B, 3, H, W), as a view (B, h, w, 3, tile size, tile size) where nothing is padded."""
        size, edges = self.config.tile_size, pixel_values.shape[2:]
        if self.config.fit == "pad":
            down, right = (-edge % size for edge in edges)
            region = pixel_values
            white = region.new_tensor(self.config.white).view(1, 3, 1, 1)
            pixel_values = white.repeat(len(region), 1, edges[0] + down, edges[1] + right)
            pixel_values[:, :, : edges[0], : edges[1]] = region
        else:
            if min(edges) < size:
                raise ValueError(
                    f"a region of {edges[1]} x {edges[0]} px has no whole tile of {size} px: set the config's fit to 'pad'"
                )
            # Python rounds halves to even, as the original's centre crop does.
            top, left = (round((edge % size) / 2) for edge in edges)
            height, width = (edge - edge % size for edge in edges)
            pixel_values = pixel_values[:, :, top : top + height, left : left + width]
        tiles = pixel_values.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, 3, h, size, w, size)
        return tiles.permute(0, 2, 4, 1, 3, 5)

    def _shown(self, tiles: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Which tiles are encoded, bool (B, h, w)."""
        if mask is None:
            return torch.ones(tiles.shape[:3], dtype=torch.bool, device=tiles.device)
        if mask.shape != tiles.shape[:3] or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask is {mask.dtype} of {tuple(mask.shape)}: it must be bool of {tuple(tiles.shape[:3])}"
            )
        return mask

    def _encode(
        self, tiles: torch.Tensor, shown: torch.Tensor
    ) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        """The places (three indices of as many tiles) and class tokens (tiles, D) of the tiles that are shown."""
        for places in shown.nonzero().split(self.config.tile_batch_size):
            if len(places):  # the one part of nothing is nothing
                where = places.unbind(dim=1)
                yield where, trunk_tokens(self.tile_encoder, tiles[where])[0]
