"""Any encoder that `AutoModel` loads, made into one function from uint8 tiles to feature vectors."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel

from ..errors import UserError
from .pooling import Pooling, pool, pooling_of


@dataclass(frozen=True)
class Encoder:
    """A model with what its release says about using it.

    Attributes:
        model: in eval mode, on its device.
        name: Hub id or directory.
        revision: the Hub's commit, or a hash of the weight files of a directory.
        pooling: how a vector is made of the output.
        size: edge of the input in pixels.
        mpp: microns per pixel of the tiles it was trained on, None when the release does not say.
        mean, std: of the channels, for pixels between 0 and 1.
    """

    model: PreTrainedModel
    name: str
    revision: str
    pooling: Pooling
    size: int
    mpp: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand before the patches: the class token and the registers."""
        return 1 + getattr(self.model.config, "num_register_tokens", 0)

    def pixels(self, tiles: torch.Tensor) -> torch.Tensor:
        """The model's input (B, 3, size, size) on its device, of uint8 `tiles` (B, h, w, 3)."""
        pixels = tiles.to(self.model.device).permute(0, 3, 1, 2)
        if pixels.shape[2:] != (self.size, self.size):
            pixels = F.resize(pixels, [self.size, self.size], InterpolationMode.BICUBIC, antialias=True)
        return F.normalize(pixels.float() / 255, list(self.mean), list(self.std))

    @torch.inference_mode()
    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        """Features (B, D), float32 on the CPU, of uint8 `tiles` (B, h, w, 3)."""
        output = self.model(self.pixels(tiles)).last_hidden_state
        return pool(output, self.pooling, self.prefix_tokens).float().cpu()


def load_encoder(
    name: str | Path, *, pooling: str | None = None, device: str | torch.device = "cpu", attention: str | None = None
) -> Encoder:
    """The encoder `name`, a Hub id or a directory.

    Args:
        pooling: overrides what the release says.
        attention: transformers' attention implementation; "eager" gives attention maps.

    Raises UserError when it cannot be loaded, lacks weights, or nothing says how to pool.
    """
    name = str(name)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        options = {"attn_implementation": attention} if attention else {}
        model, loading = AutoModel.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} cannot be loaded as an encoder ({reason}): pass a Hub id or an exported directory"
        ) from error
    missing = [key for key in loading["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise UserError(f"{name} lacks the weights {', '.join(sorted(missing)[:5])}: it is no whole encoder")
    try:
        rule = pooling_of(pooling or getattr(processor, "pooling", None), name, model.config.model_type)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Encoder(
        model=model.eval().to(device),
        name=name,
        revision=revision_of(name, model),
        pooling=rule,
        size=input_size(processor),
        mpp=getattr(processor, "mpp", None),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )


def input_size(processor: BaseImageProcessor) -> int:
    """The edge in pixels of what the processor makes: its crop if it crops, else the size it resizes to."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return int(size["height"] if "height" in size else size["shortest_edge"])


def revision_of(name: str, model: PreTrainedModel) -> str:
    """What identifies the weights: the commit of a Hub repository, or a hash of a directory's weight files."""
    if not Path(name).is_dir():
        return model.config._commit_hash or "unknown"
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(name).glob("*.safetensors")) + sorted(Path(name).glob("*.bin")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
