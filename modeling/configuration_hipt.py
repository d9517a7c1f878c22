"""Configuration of the hierarchy of HIPT (Chen et al. 2022, arXiv 2206.02647)."""

from typing import TYPE_CHECKING, Any, Literal

from transformers import AutoConfig, PretrainedConfig, ViTConfig

from .trunk import trunk_config, trunk_width


if TYPE_CHECKING:  # transformers 5.9 copies from a local folder only the files that this one names itself
    from .drop_path import add_drop_path  # noqa: F401


class HiptRegionConfig(PretrainedConfig):
    """The second level: a ViT over the grid of a region's tile features; the defaults are those of HIPT's ViT-4K-XS.

    Args:
        input_size: length of a tile's feature vector.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the transformer.
        grid_size: tiles along an edge of the table of positions; 14 in HIPT's pretraining, 16 in a region of 4096 px.
        hidden_act: of the transformer's feed-forward layers.
        layer_norm_eps: as in the published codes.
        initializer_range: standard deviation of new weights.
        dino_interpolation: for grids of another size, interpolate the table by the rule of DINO's code, whose step is a
            little different from transformers'; for weights that were trained with it, as HIPT's and SLPD's.
    """

    model_type = "hipt_region"

    def __init__(
        self,
        input_size: int = 384,
        hidden_size: int = 192,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 6,
        intermediate_size: int = 768,
        grid_size: int = 14,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        dino_interpolation: bool = False,
        **kwargs,
    ):
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.grid_size = grid_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.dino_interpolation = dino_interpolation
        super().__init__(**kwargs)

    def vit_config(self) -> ViTConfig:
        """The same as a ViT's, whose pixels are tiles and whose channels are their features."""
        return ViTConfig(
            image_size=self.grid_size,
            patch_size=1,
            num_channels=self.input_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            hidden_act=self.hidden_act,
            layer_norm_eps=self.layer_norm_eps,
            initializer_range=self.initializer_range,
        )


class HiptConfig(PretrainedConfig):
    """A tile encoder and the region encoder over its features; the defaults are HIPT's: ViT-S/16 at 256 px and ViT-4K-XS.

    Args:
        tile_config: any vision configuration of transformers with a class token, or a dict of its fields (a ViT's by
            default).
        region_config: a `HiptRegionConfig` or a dict of its fields.
        tile_size: edge of a tile in pixels.
        fit: what becomes of a region whose edges are no multiples of `tile_size`: "crop" takes its centre, as the
            original does; "pad" adds white to the right and below, so that nothing is lost.
        white: the values of a white pixel after normalisation, for each channel; 1 for a mean and deviation of 0.5.
        tile_batch_size: tiles that are encoded at once.
        tile_revision: what identifies the release that the tile encoder comes from, as features that it made say it; None
            where that is not known.
    """

    model_type = "hipt"
    sub_configs = {"tile_config": AutoConfig, "region_config": HiptRegionConfig}

    def __init__(
        self,
        tile_config: PretrainedConfig | dict[str, Any] | None = None,
        region_config: HiptRegionConfig | dict[str, Any] | None = None,
        tile_size: int = 256,
        fit: Literal["crop", "pad"] = "crop",
        white: list[float] | None = None,
        tile_batch_size: int = 256,
        tile_revision: str | None = None,
        **kwargs,
    ):
        if fit not in ("crop", "pad"):
            raise ValueError(f"fit is {fit!r}: it is 'crop' or 'pad'")
        if tile_config is None:
            tile_config = {
                "hidden_size": 384,
                "num_attention_heads": 6,
                "intermediate_size": 1536,
                "image_size": tile_size,
            }
        self.tile_config = trunk_config(tile_config)
        if not isinstance(region_config, HiptRegionConfig):
            region_config = HiptRegionConfig(**{"input_size": trunk_width(self.tile_config), **(region_config or {})})
        self.region_config = region_config
        self.tile_size = tile_size
        self.fit = fit
        self.white = [1.0, 1.0, 1.0] if white is None else white
        self.tile_batch_size = tile_batch_size
        self.tile_revision = tile_revision
        super().__init__(**kwargs)
