"""Any encoder that `AutoModel` loads, made into one function from uint8 tiles to feature vectors."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel

from ..errors import UserError
from .pooling import Pooling, pool, pooling_of
from .presets import Preset, preset_of, timm_arguments


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TIMM = "timm_wrapper"  # transformers' name for the models that timm builds
HIERARCHY = "hipt"  # the model type of a tile encoder with a region encoder
TIMM_POOLING = {"token": "cls", "avg": "gap"}
UNUSED = ("head", "fc.", "mask_token", "relative_position_index", "attn_mask")  # what timm's encoders may leave aside


@dataclass(frozen=True)
class Encoder:
    """A model with what its release says about using it.

    Attributes:
        model: in eval mode, on its device.
        name: Hub id or directory.
        revision: the Hub's commit, or a hash of the weight files of a directory.
        pooling: how a vector is made of the output.
        size: edge of the input in pixels.
        mpp: microns per pixel of the tiles it was trained on, None when nothing says it.
        mean, std: of the channels, for pixels between 0 and 1.
        other_mpp: further resolutions it was trained on.
        precision: of the forward pass, one of PRECISIONS; the weights stay as they are.
        hierarchy: the tile encoder `model` together with a region encoder; None for an encoder of tiles alone.
        region: tiles along an edge of its regions.
    """

    model: PreTrainedModel
    name: str
    revision: str
    pooling: Pooling
    size: int
    mpp: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    other_mpp: tuple[float, ...] = ()
    precision: str = "float32"
    hierarchy: PreTrainedModel | None = None
    region: int = 1

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand before the patches: the class token and the registers."""
        if self.model.config.model_type == TIMM:
            return getattr(self.model.timm_model, "num_prefix_tokens", 0)
        return 1 + getattr(self.model.config, "num_register_tokens", 0)

    def pixels(self, tiles: torch.Tensor) -> torch.Tensor:
        """The model's input (B, 3, size, size) on its device, of uint8 `tiles` (B, h, w, 3)."""
        pixels = tiles.to(self.device).permute(0, 3, 1, 2)
        if pixels.shape[2:] != (self.size, self.size):
            pixels = F.resize(pixels, [self.size, self.size], InterpolationMode.BICUBIC, antialias=True)
        return self.normalised(pixels)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 `pixels` (B, 3, h, w) by the statistics of the encoder, float32."""
        return F.normalize(pixels.float() / 255, list(self.mean), list(self.std))

    def region_pixels(self, region: np.ndarray) -> torch.Tensor:
        """The input (1, 3, h, w) of a hierarchy on its device, of a uint8 `region` (h, w, 3), at its own size."""
        return self.normalised(torch.from_numpy(np.ascontiguousarray(region)).to(self.device).permute(2, 0, 1)[None])

    @torch.inference_mode()
    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Features (B, D), float32 on the model's device, of uint8 `tiles` (B, h, w, 3)."""
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            output = self.model(self.pixels(tiles))
        if self.pooling == "gap" and self.model.config.model_type == TIMM:
            return output.pooler_output.float()  # timm's maps have their channels first or last; it knows its own
        return pool(output.last_hidden_state, self.pooling, self.prefix_tokens).float()

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        """Features (B, D), float32 on the CPU, of uint8 `tiles` (B, h, w, 3)."""
        return self.features(tiles).cpu()


def load_encoder(
    name: str | Path,
    *,
    pooling: str | None = None,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    precision: str = "float32",
) -> Encoder:
    """The encoder `name`, a Hub id or a directory; whether it may be had is found out before anything is fetched.

    Args:
        pooling: overrides what the release says.
        attention: transformers' attention implementation; "eager" gives attention maps.
        precision: of the forward pass.

    What the release does not say is taken from `presets`. Code that comes with a model is never run. Raises UserError
    when the encoder cannot be had or loaded, lacks weights, or nothing says how to pool.
    """
    name = str(name)
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")
    options: dict[str, Any] = {"local_files_only": not ask_for_access(name), "trust_remote_code": False}
    preset = preset_of(name)
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if config.model_type == "vit_mae":  # which would hide patches at random here, too
            raise UserError(
                f"{name} hides patches by itself, always: convert its encoder, `hf-pathology convert vit {name}`"
            )
        use = stated_use(name, config, preset, options)
        if attention:
            options["attn_implementation"] = attention
        if config.model_type == TIMM:
            config.model_args = timm_arguments(preset, config.model_args)
        model = load_whole(name, config, preset, options)
        use["pooling"] = pooling_of(pooling or use["pooling"], name, config.model_type)
    except (OSError, ValueError, TypeError, ImportError, SafetensorError) as error:
        raise reason_of(name, error) from error
    model = model.eval().to(device)
    if config.model_type == HIERARCHY:
        if use["pooling"] != "cls":
            raise UserError(f"{name} is a hierarchy, made for class tokens: leave out --pooling {use['pooling']}")
        tiles = model.tile_encoder.config
        if tiles.model_type == "vit" and tiles.image_size != config.tile_size:
            raise UserError(
                f"{name} has tiles of {config.tile_size} px, and positions for {tiles.image_size}: interpolate them for "
                "tiles of that size when it is made (`modeling/position.py`)"
            )
        use["hierarchy"], model = model, model.tile_encoder
    return Encoder(model, name, revision_of(name), precision=precision, **use)


def ask_for_access(name: str) -> bool:
    """Whether the Hub can be asked for the model; False when only this machine can have it.

    Raises UserError when the Hub does not know it, or does not give it to this user.
    """
    if Path(name).is_dir():
        return False
    try:
        validate_repo_id(name)
        HfApi().auth_check(name)
    except HFValidationError as error:
        raise UserError(
            f"{name} cannot be loaded: it is no directory, and cannot be the id of a Hub repository"
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: ask for access at https://huggingface.co/{name}, and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name} cannot be loaded: the Hub has no such model, or it is private; "
            "check the id, or log in with `hf auth login`"
        ) from error
    except HfHubHTTPError:  # a mirror that does not know the question; loading will tell
        return True
    except (OfflineModeIsEnabled, HTTPError):  # this one: nobody answers
        return False
    return True


def stated_use(name: str, config: Any, preset: Preset | None, options: dict[str, Any]) -> dict[str, Any]:
    """How the encoder is to be used: pooling (or None), size, mpp, other_mpp, mean and std.

    The release comes first: timm's are in the configuration, others in the processor. Raises OSError or ValueError when
    neither it nor a preset says what is needed.
    """
    known = {} if preset is None else {each: getattr(preset, each) for each in ("pooling", "size", "mean", "std")}
    known |= {"mpp": preset and preset.mpp, "other_mpp": preset.other_mpp if preset else ()}
    known.setdefault("pooling", None)
    if config.model_type == TIMM:
        cfg = config.pretrained_cfg
        stated = {"size": cfg.get("input_size", (None,))[-1], "mean": cfg.get("mean"), "std": cfg.get("std")}
        if preset is None:
            stated["pooling"] = TIMM_POOLING.get(getattr(config, "global_pool", None))
    else:
        try:
            processor = AutoImageProcessor.from_pretrained(name, **options)
        except OSError:
            if preset is None:
                raise
            return known
        stated = {"size": input_size(processor), "mean": processor.image_mean, "std": processor.image_std}
        stated |= {each: getattr(processor, each, None) for each in ("pooling", "mpp")}
        if config.model_type == HIERARCHY:
            stated |= {"size": config.tile_size, "region": getattr(processor, "region", None)}
        if stated["mpp"] is not None:
            known["other_mpp"] = ()
    known |= {each: value for each, value in stated.items() if value is not None}
    needed = ("size", "mean", "std", *(["region"] if config.model_type == HIERARCHY else []))
    lacking = [each for each in needed if known.get(each) is None]
    if lacking:
        raise ValueError(f"it does not state its {', '.join(lacking)}")
    return {**known, "mean": tuple(known["mean"]), "std": tuple(known["std"])}


def load_whole(name: str, config: Any, preset: Preset | None, options: dict[str, Any]) -> PreTrainedModel:
    """The model with all its weights. Raises UserError when some are missing, or would be left aside unheard of."""
    options = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True, **options}
    model, loading = AutoModel.from_pretrained(name, **options)
    missing = missing_weights(loading)
    if missing and preset and preset.renamed:
        model, loading = AutoModel.from_pretrained(name, key_mapping=dict(preset.renamed), **options)
        missing = missing_weights(loading)
    if missing:
        raise UserError(f"{name} lacks the weights {', '.join(missing[:5])}: it is no whole encoder")
    left = [key for key in loading["unexpected_keys"] if not any(part in key for part in UNUSED)]
    if left and config.model_type == TIMM:  # timm's configurations do not say all that the architecture needs
        raise UserError(
            f"{name} has weights that its architecture, {config.architecture}, does not use ({', '.join(sorted(left)[:5])}): "
            "its configuration is incomplete"
        )
    return model


def missing_weights(loading: dict[str, Any]) -> list[str]:
    """What a model did not find in its files, or not in its shape, but for a pooler, which is not used."""
    found_otherwise = [key for key, *_ in loading["mismatched_keys"]]
    return sorted(key for key in [*loading["missing_keys"], *found_otherwise] if not key.startswith("pooler."))


def reason_of(name: str, error: Exception) -> UserError:
    """The one line that says why the encoder cannot be loaded, and what to do."""
    if isinstance(error, UserError):
        return error
    reason = str(error).strip().splitlines()[0]
    if "trust_remote_code" in str(error):
        return UserError(
            f"{name} comes with code of its own, which is never run here: convert it to a model of transformers, "
            "and pass that directory"
        )
    if "timm" in reason and isinstance(error, ImportError):
        return UserError(f"{name} is a model of timm, which is not installed: pip install timm")
    if "does not say how to pool" in reason or "asks for pooling" in reason:
        return UserError(reason)
    where = "a Hub id or an exported directory"
    if not Path(name).is_dir() and "offline" in str(error):
        where = "what was downloaded before, or let this machine reach the Hub"
    return UserError(f"{name} cannot be loaded as an encoder ({reason}): pass {where}")


def input_size(processor: BaseImageProcessor) -> int:
    """The edge in pixels of what the processor makes: its crop if it crops, else the size it resizes to."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return int(size["height"] if "height" in size else size["shortest_edge"])


def revision_of(name: str) -> str:
    """What identifies the weights: the commit of a Hub repository, or a hash of a directory's weight files."""
    if not Path(name).is_dir():
        return Path(hf_hub_download(name, "config.json", local_files_only=True)).parent.name  # snapshots/COMMIT
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(name).glob("*.safetensors")) + sorted(Path(name).glob("*.bin")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
