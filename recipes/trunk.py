"""The first paragraph of every pretraining recipe: the trunk, new or from a release, and how it is computed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, ViTConfig

from hf_pathology.errors import UserError, require_at_least
from hf_pathology.features.embed import check_resolution
from hf_pathology.features.encoder import load_encoder
from hf_pathology.modeling.configuration_hipt import HiptRegionConfig
from hf_pathology.tiles.views import ViewOptions


TRANSFORMERS = ("vit", "dinov2", "dinov2_with_registers")  # trunks that the options below can size


@dataclass
class TrunkOptions:
    """The trunk: a release, or a new one of a type of transformers.

    Attributes:
        encoder: Hub id or directory of the release from which training starts, student and teacher; a new trunk when None.
        trunk: the model type of a new trunk: vit, dinov2, dinov2_with_registers, or any other vision model of transformers
            (resnet: ResNet-50), which has the size that its type has by default but for what is said below.
        hidden_size, num_hidden_layers, num_attention_heads, patch_size, initializer_range: of a transformer.
        num_register_tokens: registers of a dinov2_with_registers (Darcet et al. 2023, arXiv 2309.16588).
        layer_scale: initial factor of the residual branches of a dinov2 (Touvron et al. 2021, arXiv 2103.17239).
        swiglu: gated feed-forward layers in a dinov2.
        stage_sizes, stage_depths: widths and layers of the stages of a resnet or convnext.
        compile: compile each layer by torch.compile.
        activation_checkpointing: compute activations again in the backward pass, to save memory.
    """

    encoder: str | None = None
    trunk: str = "vit"
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    patch_size: int = 16
    initializer_range: float = 0.02
    num_register_tokens: int = 4
    layer_scale: float = 1.0e-5
    swiglu: bool = False
    stage_sizes: list[int] | None = None
    stage_depths: list[int] | None = None
    compile: bool = False
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, patch_size=self.patch_size)
        require_whole_heads(self)

    def deciding(self) -> dict[str, object]:
        """The options that decide the result; compiled or not, a run may go on."""
        return without_ways_to_compute(self)


@dataclass
class RegionTrunkOptions:
    """The trunk of the second level of the hierarchy, a transformer over grids of tile features; HIPT's by default.

    Attributes:
        encoder: Hub id or directory of a release from which training starts, student and teacher; a new trunk when None.
        hidden_size, num_hidden_layers, num_attention_heads, initializer_range: of the transformer.
        compile: compile each layer by torch.compile.
        activation_checkpointing: compute activations again in the backward pass, to save memory.
    """

    encoder: str | None = None
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    initializer_range: float = 0.02
    compile: bool = False
    activation_checkpointing: bool = False

    trunk: ClassVar[str] = HiptRegionConfig.model_type

    def __post_init__(self) -> None:
        require_whole_heads(self)

    def deciding(self) -> dict[str, object]:
        """The options that decide the result; compiled or not, a run may go on."""
        return without_ways_to_compute(self)


def require_whole_heads(options: TrunkOptions | RegionTrunkOptions) -> None:
    """Raises UserError for sizes of which no transformer can be made."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    require_at_least(1, **{name: getattr(options, name) for name in names})
    if options.hidden_size % options.num_attention_heads:
        raise UserError(
            f"hidden_size is {options.hidden_size}: it must be a multiple of num_attention_heads, "
            f"{options.num_attention_heads}"
        )


def without_ways_to_compute(options: TrunkOptions | RegionTrunkOptions) -> dict[str, object]:
    free = {"compile", "activation_checkpointing"}
    return {name: value for name, value in asdict(options).items() if name not in free}


def new_trunk(options: TrunkOptions, image_size: int) -> PretrainedConfig:
    """The configuration of an untrained trunk for views of `image_size` pixels. Raises UserError for an unknown type."""
    if options.trunk not in TRANSFORMERS:
        fields = {"hidden_sizes": options.stage_sizes, "depths": options.stage_depths}
        try:
            return AutoConfig.for_model(options.trunk, **{name: value for name, value in fields.items() if value})
        except ValueError as error:
            raise UserError(f"trunk is {options.trunk}: it is no model type of transformers") from error
    if image_size % options.patch_size:
        raise UserError(f"global_size is {image_size}: it must be a multiple of patch_size, {options.patch_size}")
    fields = {
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_hidden_layers,
        "num_attention_heads": options.num_attention_heads,
        "patch_size": options.patch_size,
        "image_size": image_size,
        "initializer_range": options.initializer_range,
        "layer_norm_eps": 1e-6,
    }
    if options.trunk == "vit":
        return ViTConfig(**fields, intermediate_size=4 * options.hidden_size)
    if options.trunk == "dinov2_with_registers":
        fields["num_register_tokens"] = options.num_register_tokens
    return AutoConfig.for_model(
        options.trunk, **fields, layerscale_value=options.layer_scale, use_swiglu_ffn=options.swiglu
    )


def new_region_trunk(options: RegionTrunkOptions, width: int, grid_size: int) -> HiptRegionConfig:
    """The configuration of an untrained trunk for grids of `grid_size` tiles with features of length `width`."""
    return HiptRegionConfig(
        input_size=width,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.num_attention_heads,
        intermediate_size=4 * options.hidden_size,
        grid_size=grid_size,
        initializer_range=options.initializer_range,
    )


def make_method(
    kind: type[PreTrainedModel],
    config_of: Callable[[PretrainedConfig | None], PretrainedConfig],
    options: TrunkOptions | RegionTrunkOptions,
    new_trunk: Callable[[], PretrainedConfig],
    accelerator: Accelerator,
) -> PreTrainedModel:
    """The method `kind`, untrained and the same on every rank, or with its trunks from the release `options.encoder`.

    Args:
        config_of: makes the method's configuration of that of a trunk.
        new_trunk: the configuration of an untrained trunk; may raise UserError.

    Raises UserError when the release cannot be loaded, or the trunk does not fit the method.
    """
    named = f"--encoder {options.encoder}" if options.encoder else f"--trunk {options.trunk}"
    try:
        if options.encoder:
            method = kind.from_encoder(options.encoder, config_of(None))
        else:
            method = kind(config_of(new_trunk()))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{named}: {error}") from error
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    method.suit(accelerator.device)
    if options.activation_checkpointing:
        for trunk in method.trunks:
            trunk.activation_checkpointing_enable()
    if options.compile:
        for layer in method.layers:
            layer.compile(dynamic=False)
    return method


def patch_grid(config: PretrainedConfig, image_size: int) -> int:
    """Patches along an edge of a view, for the trunk of this configuration. Raises UserError when it has no patches."""
    patch_size = getattr(config, "patch_size", None)
    if patch_size is None:
        raise UserError(f"a {config.model_type} has no patches to hide: take a vit or dinov2, or train with DINO")
    return image_size // patch_size


def views_for_release(views: ViewOptions, options: TrunkOptions, mpp: float | None) -> ViewOptions:
    """The views with the mean and standard deviation of the release that training starts from, if from one.

    Raises UserError when the release was made for tiles of another resolution or size.
    """
    if options.encoder is None:
        return views
    release = load_encoder(options.encoder, pooling="cls")  # for its statistics only; pooling is the method's affair
    if mpp is not None:
        check_resolution(release, mpp)
    if release.size != views.global_size:
        raise UserError(
            f"--encoder {options.encoder} takes views of {release.size} px: choose --global_size {release.size}"
        )
    return replace(views, mean=list(release.mean), std=list(release.std))
