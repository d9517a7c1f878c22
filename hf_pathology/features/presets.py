"""What the model cards of well-known encoders say about using them, for what their files on the Hub do not say.

A preset never overrides a release: each entry is asked for only where the processor and the configuration are silent. The
entries were taken down from the cards named beside them. What they do is tested on small models of the same architectures
with random weights (class tokens, registers, SwiGLU, a Swin with a convolutional stem); the released weights lie behind
access requests and are not a part of these tests.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .pooling import Pooling


Colours = tuple[float, float, float]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTIMUS_MEAN, OPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU_MEAN, HIBOU_STD = (0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preset:
    """How an encoder was meant to be used.

    Attributes:
        source: where that is written.
        pooling: see `pooling.pool`.
        mpp: microns per pixel of the tiles it was trained on, None when it is none for tissue.
        other_mpp: further resolutions it was trained on.
        size: edge of the input in pixels.
        mean, std: of the channels, for pixels between 0 and 1.
        timm_arguments: what timm has to be told besides the name of the architecture; layers by their names.
        renamed: patterns of weight names, and what timm calls them.
    """

    source: str
    pooling: Pooling = "cls"
    mpp: float | None = 0.5
    other_mpp: tuple[float, ...] = ()
    size: int = 224
    mean: Colours = IMAGENET_MEAN
    std: Colours = IMAGENET_STD
    timm_arguments: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
UNI2_VIT = {"img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536}
UNI2_VIT |= {"mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True, **SWIGLU}
LAYER_SCALE = {"init_values": 1e-5}
SWIN_STAGES = {rf"^layers\.{stage}\.downsample": f"layers.{stage + 1}.downsample" for stage in (2, 1, 0)}

# By what a Hub id starts with, or the name of a directory; the longest that fits counts.
PRESETS: dict[str, Preset] = {
    "owkin/phikon": Preset("https://huggingface.co/owkin/phikon"),
    "owkin/phikon-v2": Preset("https://huggingface.co/owkin/phikon-v2"),
    "MahmoodLab/UNI": Preset(
        "https://huggingface.co/MahmoodLab/UNI", timm_arguments={**LAYER_SCALE, "dynamic_img_size": True}
    ),
    "MahmoodLab/UNI2-h": Preset("https://huggingface.co/MahmoodLab/UNI2-h", timm_arguments=UNI2_VIT),
    "paige-ai/Virchow": Preset(
        "https://huggingface.co/paige-ai/Virchow", "cls+mean", timm_arguments={**LAYER_SCALE, **SWIGLU}
    ),
    "paige-ai/Virchow2": Preset(
        "https://huggingface.co/paige-ai/Virchow2, arXiv:2408.00738 (5x, 10x, 20x and 40x)",
        "cls+mean",
        other_mpp=(0.25, 1.0, 2.0),
        timm_arguments={**LAYER_SCALE, "reg_tokens": 4, **SWIGLU},
    ),
    "bioptimus/H-optimus": Preset(
        "https://huggingface.co/bioptimus/H-optimus-0 (4 registers) and H-optimus-1",
        mean=OPTIMUS_MEAN,
        std=OPTIMUS_STD,
        timm_arguments={**LAYER_SCALE, "dynamic_img_size": False},
    ),
    "prov-gigapath/prov-gigapath": Preset("https://huggingface.co/prov-gigapath/prov-gigapath"),
    "1aurent/swin_tiny_patch4_window7_224.CTransPath": Preset(
        "doi:10.1016/j.media.2022.102559; the authors' weights as timm names them",
        "gap",
        mpp=1.0,
        timm_arguments={"embed_layer": "ConvStem"},
        renamed=SWIN_STAGES,
    ),
    "histai/hibou": Preset("https://huggingface.co/histai/hibou-L", mean=HIBOU_MEAN, std=HIBOU_STD),
    "kaiko-ai/midnight": Preset(
        "https://huggingface.co/kaiko-ai/midnight, arXiv:2504.05186",
        "cls+mean",
        other_mpp=(0.25, 1.0, 2.0),
        mean=HALF,
        std=HALF,
    ),
    "vit256_small_dino": Preset(  # the file that HIPT publishes; a directory it was converted to
        "https://github.com/mahmoodlab/HIPT, HIPT_4K: evaluated with 0.5, trained with ImageNet's statistics",
        size=256,
        mean=HALF,
        std=HALF,
    ),
    "facebook/dino": Preset("https://huggingface.co/facebook/dino-vitb16", mpp=None),
    "facebook/vit-mae": Preset("https://huggingface.co/facebook/vit-mae-base", mpp=None),
    "microsoft/resnet": Preset("https://huggingface.co/microsoft/resnet-50", "gap", mpp=None),
}


def preset_of(encoder: str) -> Preset | None:
    """The preset for a Hub id or a directory, whatever its upper and lower case, or None."""
    names = encoder.lower(), Path(encoder).name.lower()
    fitting = [prefix for prefix in PRESETS if any(name.startswith(prefix.lower()) for name in names)]
    return PRESETS[max(fitting, key=len)] if fitting else None


def timm_arguments(preset: Preset | None, stated: Mapping[str, Any] | None) -> dict[str, Any]:
    """What timm has to be told to build the architecture: what the release states, and else the preset."""
    import timm.layers  # an extra: most encoders do not need it

    arguments = {**(preset.timm_arguments if preset else {}), **(stated or {})}
    arguments.pop("num_classes", None)  # transformers passes it itself, and timm refuses it twice
    layers = {**vars(timm.layers), "ConvStem": ConvStem}
    for name in ("mlp_layer", "embed_layer"):
        if isinstance(arguments.get(name), str):
            arguments[name] = layers.get(arguments[name], arguments[name])
    return arguments


class ConvStem(nn.Module):
    """CTransPath's patch embedding: two convolutions that halve the image and one that widens it.

    Args:
        embed_dim: channels of the output; the convolutions before it have an eighth and a quarter of them.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 4, in_chans: int = 3, embed_dim: int = 96, **_: Any):
        super().__init__()
        self.patch_size, self.img_size = (patch_size, patch_size), (img_size, img_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers, channels = [], in_chans
        for width in (embed_dim // 8, embed_dim // 4):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers, channels = [*layers, nn.ReLU(inplace=True)], width
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, 1))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, pixels):
        """Patches (B, h / 4, w / 4, embed_dim), the channels last as timm's Swin wants them."""
        return self.norm(self.proj(pixels).permute(0, 2, 3, 1))
