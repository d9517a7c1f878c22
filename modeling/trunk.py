"""The trunk of a pretraining method: any vision model of transformers, made, called and started in one way.

A trunk with a class token gives that token and its patch tokens; one without (ResNet, ConvNeXt, Swin) gives what its own
pooling makes of its map. Methods that hide patches need a trunk that takes `bool_masked_pos`.
"""

import inspect
import re
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, ViTConfig, ViTModel

from .drop_path import add_drop_path


def trunk_config(config: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig:
    """The configuration of a trunk, of its dict (with `model_type`, a `vit` without) or of None, the default ViT-B/16.

    The epsilon of a `vit`'s layer norms is 1e-6 unless it is given, as all published pretraining codes have it.
    """
    if isinstance(config, PretrainedConfig):
        return config
    fields = dict(config or {})
    model_type = fields.pop("model_type", "vit")
    if model_type == "vit":
        return ViTConfig(**{"layer_norm_eps": 1e-6, **fields})
    return AutoConfig.for_model(model_type, **fields)


def make_trunk(
    config: PretrainedConfig, *, drop_path_rate: float = 0.0, drop_subset: bool = False, hides_patches: bool = False
) -> PreTrainedModel:
    """An untrained trunk, without a pooler of weights, with stochastic depth, and a mask token if it `hides_patches`.

    Raises ValueError when a trunk of this type has no stochastic depth, cannot hide patches, or hides them by itself.
    """
    if config.model_type == "vit_mae":
        raise ValueError("a vit_mae hides patches by itself, always: export its encoder as a vit and start from that")
    config = deepcopy(config)
    if hasattr(config, "use_mask_token"):
        config.use_mask_token = hides_patches
    if hasattr(config, "drop_path_rate"):
        config.drop_path_rate = drop_path_rate
    if config.model_type == "vit":
        trunk = ViTModel(config, add_pooling_layer=False, use_mask_token=hides_patches)
    else:
        trunk = AutoModel.from_config(config)
    if hides_patches and not (_takes(trunk, "bool_masked_pos") and has_class_token(trunk)):
        raise ValueError(f"a {config.model_type} cannot hide patches: take a vit or dinov2 trunk, or train with DINO")
    if not hides_patches and isinstance(getattr(trunk, "embeddings", None), nn.Module):
        trunk.embeddings.mask_token = None  # of no use, and without a gradient
    add_drop_path(trunk, drop_path_rate, drop_subset)
    return trunk


def trunk_width(config: PretrainedConfig) -> int:
    """The size of a trunk's features."""
    sizes = getattr(config, "hidden_sizes", None)  # of the stages of a convolutional network
    return sizes[-1] if sizes else config.hidden_size


def has_class_token(trunk: PreTrainedModel) -> bool:
    """Whether the trunk's first token stands for the whole image."""
    return any(name.endswith("cls_token") for name, _ in trunk.named_parameters())


def trunk_tokens(
    trunk: PreTrainedModel, pixels: torch.Tensor, hidden: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The image features (B, D) and the patch features (B, patches, D) of `pixels` (B, 3, H, W).

    The first is the class token, or the pooled map of a trunk that has none, whose second is None.

    Args:
        hidden: bool (B, patches), True for the patches that the trunk does not see.
    """
    options: dict[str, Any] = {} if hidden is None else {"bool_masked_pos": hidden}
    if _takes(trunk, "interpolate_pos_encoding"):
        options["interpolate_pos_encoding"] = True
    output = trunk(pixels, **options)
    if not has_class_token(trunk):
        return output.pooler_output.flatten(1), None
    return split_tokens(trunk, output.last_hidden_state)


def split_tokens(trunk: PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The class token (B, D) and the patch tokens (B, patches, D) of `tokens`; registers are left out."""
    return tokens[:, 0], tokens[:, 1 + getattr(trunk.config, "num_register_tokens", 0) :]


def trunk_weights(encoder: str) -> dict[str, torch.Tensor]:
    """The weights of the released `encoder`, a Hub id or a directory, without its pooler.

    Raises ValueError when weights are missing.
    """
    release, loading = AutoModel.from_pretrained(encoder, output_loading_info=True)
    missing = [key for key in loading["missing_keys"] if not key.startswith("pooler.") and "mask_token" not in key]
    if missing:
        raise ValueError(f"{encoder} lacks the weights {sorted(missing)[:5]}")
    return {name: weight for name, weight in release.state_dict().items() if not name.startswith("pooler.")}


def start_trunk(trunk: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Loads `weights` into `trunk`, but for a mask token that only one of them has. Raises RuntimeError on other names."""
    own = trunk.state_dict()
    weights = {name: weight for name, weight in weights.items() if name in own or not name.endswith("mask_token")}
    kept = {name: weight for name, weight in own.items() if name.endswith("mask_token") and name not in weights}
    trunk.load_state_dict({**weights, **kept})


def trunk_depths(trunk: PreTrainedModel) -> dict[str, int]:
    """The depth of each parameter of `trunk`: 0 for embeddings, i + 1 for layer i, one more than that above the layers.

    For layer-wise decay of the learning rate (Clark et al. 2020, arXiv 2003.10555; DINOv2, arXiv 2304.07193).
    """
    layers = {name: int(found[1]) for name, _ in trunk.named_parameters() if (found := _LAYER.search(name))}
    above = max(layers.values(), default=-1) + 2
    return {
        name: layers[name] + 1 if name in layers else (0 if name.startswith("embed") else above)
        for name, _ in trunk.named_parameters()
    }


_LAYER = re.compile(r"(?:^|\.)(?:layers?|stages)\.(\d+)\.")


def _takes(trunk: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(type(trunk).forward).parameters
