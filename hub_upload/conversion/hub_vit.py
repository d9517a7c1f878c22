"""Vision Transformers in the names of transformers: those of its present modules, and those of all files until now."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig
from transformers.activations import ACT2FN

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.conversion.original_vit import LAYER_NORM_EPS, heads_of, table_edge


Tensors = dict[str, torch.Tensor]

LEGACY = {  # what files call the parts of a layer, and what the modules are called since transformers 5.9
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}
PRESENT = {name: name for name in LEGACY.values()}
OUTSIDE = (
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.bias",
    "layernorm.weight",
    "layernorm.bias",
)
LEGACY_LAYER, LAYER = "encoder.layer", "layers"
BIASES = ("query.bias", "key.bias", "value.bias", "q_proj.bias", "k_proj.bias", "v_proj.bias")


def hub_keys(names: Iterable[str]) -> list[str]:
    """The keys of a ViT in transformers' names, old or new, with as many layers as `names` has."""
    names = set(names)
    start, parts = (LEGACY_LAYER, LEGACY) if any(name.startswith(LEGACY_LAYER) for name in names) else (LAYER, PRESENT)
    keys = [
        f"{start}.{layer}.{part}.{kind}"
        for layer in range(depth_of(names))
        for part in parts
        for kind in ("weight", "bias")
    ]
    biased = any(name.endswith(BIASES) for name in names)
    return [*OUTSIDE, *(key for key in keys if biased or not key.endswith(BIASES))]


def depth_of(names: Iterable[str]) -> int:
    found = [re.match(r"(?:encoder\.layer|layers)\.(\d{1,4})\.", name) for name in names]
    return 1 + max((int(each[1]) for each in found if each), default=-1)


def hub_name(key: str) -> str:
    """What the modules call `key`, an old or a new name."""
    if not key.startswith(f"{LEGACY_LAYER}."):
        return key
    layer, rest = key.removeprefix(f"{LEGACY_LAYER}.").split(".", 1)
    part, kind = rest.rsplit(".", 1)
    return f"{LAYER}.{layer}.{LEGACY[part]}.{kind}"


def hub_weights(tensors: Tensors) -> Tensors:
    """The tensors under the names of the modules."""
    return {hub_name(key): tensor for key, tensor in tensors.items()}


def require_vit(stated: dict[str, Any] | None, path: Path) -> None:
    """Raises UserError when the `config.json` of the folder `path` is that of another type than a ViT."""
    model_type = (stated or {}).get("model_type", "vit")
    if model_type not in ("vit", "vit_mae"):
        raise UserError(
            f"{path} is a {model_type} by its config.json: only a vit is converted, others load as they are"
        )


def hub_config(weights: Tensors, stated: dict[str, Any] | None, num_heads: int | None) -> ViTConfig:
    """The configuration of a ViT, as its `weights` imply it, and for the rest as a `config.json` has `stated` it.

    Raises UserError when no ViT has these shapes.
    """
    stated = stated or {}
    kernel = weights["embeddings.patch_embeddings.projection.weight"]
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise UserError(f"the patch embedding is of {tuple(kernel.shape)}: patches of a ViT are square")
    width, channels, patch_size = kernel.shape[:3]
    heads = num_heads or stated.get("num_attention_heads") or heads_of(width)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"{heads} heads do not divide the width of {width}: pass another --num-heads")
    eps, activation = stated.get("layer_norm_eps", LAYER_NORM_EPS), stated.get("hidden_act", "gelu")
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise UserError(f"config.json says {eps!r} as layer_norm_eps: it is a small number")
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise UserError(f"config.json says {activation!r} as hidden_act: transformers has no such activation")
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth_of(weights),
        num_attention_heads=heads,
        intermediate_size=len(weights[f"{LAYER}.0.mlp.fc1.weight"]),
        image_size=patch_size * table_edge(weights["embeddings.position_embeddings"]),
        patch_size=patch_size,
        num_channels=channels,
        qkv_bias=f"{LAYER}.0.attention.q_proj.bias" in weights,
        layer_norm_eps=eps,
        hidden_act=activation,
    )
