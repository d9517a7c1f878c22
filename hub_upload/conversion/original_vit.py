"""Vision Transformers as the codes of DINO, iBOT, MAE, HIPT and timm name them, and as transformers does.

The original codes have one matrix for query, key and value, rows in that order; transformers has three.
"""

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from hf_pathology.errors import UserError
from hf_pathology.modeling.position import dino_position_table


Tensors = dict[str, torch.Tensor]
Model = TypeVar("Model", bound=nn.Module)

OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "masked_embed": "embeddings.mask_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
INSIDE = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
EMBEDDINGS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
TABLE = "embeddings.position_embeddings"
LAYER_NORM_EPS = 1e-6  # in all of these codes
HEAD_WIDTH = 64
HEADS_OF_WIDTH = {1280: 16}  # ViT-H, whose heads are 80 wide


def vit_names(key: str) -> tuple[str, ...]:
    """What transformers calls the original parameter `key`: three names where it fuses query, key and value."""
    if key in OUTSIDE:
        return (OUTSIDE[key],)
    _, layer, rest = key.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return tuple(f"layers.{layer}.{name}.{kind}" for name in INSIDE[module])


def vit_weights(tensors: Tensors, prefix: str = "") -> Tensors:
    """The tensors of an original ViT whose keys start with `prefix`, under transformers' names."""
    weights = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            names = vit_names(key.removeprefix(prefix))
            for name, part in zip(names, tensor.chunk(len(names))):
                weights[name] = part[None] if name == "embeddings.mask_token" else part
    return weights


def block_keys(names: Iterable[str], blocks: str = "blocks") -> list[str]:
    """The keys of all layers of an original transformer, as many as `names` has of them."""
    names = set(names)
    depth = 1 + max((index_in(name, blocks) for name in names), default=-1)
    kinds = ["weight", "bias"]
    keys = [f"{blocks}.{i}.{module}.{kind}" for i in range(depth) for module in INSIDE for kind in kinds]
    if f"{blocks}.0.attn.qkv.bias" in names:
        return keys
    return [key for key in keys if not key.endswith("attn.qkv.bias")]


def vit_keys(names: Iterable[str]) -> list[str]:
    """The keys of an original ViT, with as many layers as `names` has."""
    return [*EMBEDDINGS, *block_keys(names), "norm.weight", "norm.bias"]


def index_in(name: str, blocks: str) -> int:
    """The number of the layer in `name`, -1 for what lies in none."""
    number = name.removeprefix(f"{blocks}.").split(".")[0] if name.startswith(f"{blocks}.") else ""
    return int(number) if number.isdecimal() and len(number) < 6 else -1


def vit_config(tensors: Tensors, num_heads: int | None = None) -> ViTConfig:
    """The configuration of an original ViT, as its tensors imply it; the number of heads by the rule of these codes.

    Raises UserError for shapes that no such ViT has.
    """
    kernel, table = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise UserError(f"patch_embed.proj.weight is of {tuple(kernel.shape)}: patches of a ViT are square")
    width, channels, patch_size = kernel.shape[:3]
    return ViTConfig(
        image_size=patch_size * table_edge(table),
        patch_size=patch_size,
        num_channels=channels,
        **layer_fields(tensors, width, "blocks", num_heads or heads_of(width)),
    )


def layer_fields(tensors: Tensors, width: int, blocks: str, num_heads: int) -> dict[str, int | float | bool]:
    """The fields of a configuration that its layers decide."""
    if width % num_heads:
        raise UserError(f"{num_heads} heads do not divide the width of {width}: pass another --num-heads")
    return {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(index_in(name, blocks) for name in tensors),
        "num_attention_heads": num_heads,
        "intermediate_size": len(tensors[f"{blocks}.0.mlp.fc1.weight"]),
        "qkv_bias": f"{blocks}.0.attn.qkv.bias" in tensors,
        "layer_norm_eps": LAYER_NORM_EPS,
    }


def heads_of(width: int) -> int:
    """The number of heads that a ViT of this width has in the published codes. Raises UserError when they have none."""
    if width not in HEADS_OF_WIDTH and width % HEAD_WIDTH:
        raise UserError(f"no tensor says how many heads a ViT of width {width} has: pass --num-heads")
    return HEADS_OF_WIDTH.get(width, width // HEAD_WIDTH)


def table_edge(table: torch.Tensor) -> int:
    """The patches along an edge of a position `table` (1, 1 + n * n, D). Raises UserError when they are no square."""
    edge = math.isqrt(max(table.shape[1] - 1, 0)) if table.ndim == 3 else 0
    if edge < 1 or edge * edge != table.shape[1] - 1:
        raise UserError(f"the table of positions is of {tuple(table.shape)}: it is not of a class token and a square")
    return edge


def whole_vit(config: ViTConfig, weights: Tensors, image_size: int | None, dino_table: bool) -> ViTModel:
    """The ViT with these `weights`, its table of positions made for images of `image_size`, its own size when None.

    Args:
        dino_table: by the rule of DINO's code, otherwise by transformers'.

    Raises UserError when a weight is not of the shape that `config` asks for, or the size is no multiple of the patch.
    """
    if image_size is not None and (image_size % config.patch_size or image_size < config.patch_size):
        raise UserError(f"--image-size {image_size} is no multiple of the patch size, {config.patch_size}")
    if image_size is not None and image_size != config.image_size:
        edge = image_size // config.patch_size
        resize = dino_position_table if dino_table else resized_table
        weights = {**weights, TABLE: resize(weights[TABLE], (edge, edge))}
        config.image_size = image_size
    with torch.device("meta"):
        model = ViTModel(config, add_pooling_layer=False)
    return with_weights(model, weights)


def resized_table(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The position `table` for a `grid` of patches by transformers' rule, which is MAE's, too."""
    edge = table_edge(table)
    patches = table[:, 1:].reshape(1, edge, edge, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    patches = nn.functional.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def with_weights(model: Model, weights: Tensors) -> Model:
    """`model`, whose own tensors may be on the meta device, in eval mode with copies of `weights`.

    Raises UserError when their names or shapes are not its own.
    """
    own = model.state_dict()
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            asked = f"of {tuple(own[name].shape)}" if name in own else "not there"
            raise UserError(
                f"{name} is of {tuple(weight.shape)}, and {asked} in the architecture of the other tensors"
            )
    copies = {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()
