"""Configuration of HIPT's slide classifiers (Chen et al. 2022, arXiv 2206.02647): regions of tiles, then a slide of regions."""

from typing import TYPE_CHECKING, Any, Literal

from .configuration_hipt import HiptRegionConfig
from .configuration_slide_head import SlideHeadConfig


if TYPE_CHECKING:  # transformers 5.9 copies from a local folder only the files that this one names itself
    from .drop_path import add_drop_path  # noqa: F401
    from .trunk import trunk_config  # noqa: F401


class HiptSlideConfig(SlideHeadConfig):
    """What a slide classifier over regions is made of; the defaults are those of HIPT's local-global model.

    Args, beside those of `SlideHeadConfig`:
        region_tiles: how many tiles that follow each other are one region; 1 when features are of regions already.
        local: what makes a region of its tiles: a "transformer" over their grid, HIPT's second level, or gated
            "attention", the published comparison without transformers, which has none over the regions either.
        region_config: of that transformer, a `HiptRegionConfig` or a dict of its fields.
        freeze_regions: leave the weights of that transformer as they are.
        hidden_size: width of the slide level; that of the transformer over the grid where there is one.
        num_hidden_layers, num_attention_heads: of the transformer over the regions.
        dropout: probability everywhere in the slide level.
    """

    model_type = "hipt_slide"
    sub_configs = {"region_config": HiptRegionConfig}

    def __init__(
        self,
        input_dim: int = 384,
        region_tiles: int = 256,
        local: Literal["transformer", "attention"] = "transformer",
        region_config: HiptRegionConfig | dict[str, Any] | None = None,
        freeze_regions: bool = False,
        hidden_size: int | None = None,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 3,
        dropout: float = 0.25,
        **kwargs,
    ):
        if local not in ("transformer", "attention"):
            raise ValueError(f"local is {local!r}: it is 'transformer' or 'attention'")
        if region_config is None and local == "transformer" and region_tiles > 1:
            region_config = {}
        if isinstance(region_config, dict):
            region_config = HiptRegionConfig(**{"input_size": input_dim, **region_config})
        self.region_tiles = region_tiles
        self.local = local
        self.region_config = region_config
        self.freeze_regions = freeze_regions
        if hidden_size is None:
            hidden_size = 256 if local == "attention" else region_config.hidden_size if region_config else 192
        if local == "transformer" and hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size is {hidden_size}: {num_attention_heads} heads cannot share it")
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.dropout = dropout
        super().__init__(input_dim=input_dim, **kwargs)
