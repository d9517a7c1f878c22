"""The second level of HIPT and SLPD as their code names it, alone or over a tile encoder."""

from collections.abc import Iterable

import torch
from transformers import ViTModel

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.conversion.original_vit import (
    block_keys,
    layer_fields,
    table_edge,
    vit_weights,
    with_weights,
)
from hf_pathology.modeling.configuration_hipt import HiptConfig, HiptRegionConfig
from hf_pathology.modeling.modeling_hipt import HiptModel, HiptRegionModel


Tensors = dict[str, torch.Tensor]

REGION_HEADS = 6  # of ViT-4K-XS, whose heads are 32 wide
PROJECTION = "vit.embeddings.patch_embeddings.projection.0"


def region_keys(names: Iterable[str]) -> list[str]:
    """The keys of an original ViT-4K, with as many layers as `names` has."""
    outside = ["cls_token", "pos_embed", "phi.0.weight", "phi.0.bias", "norm.weight", "norm.bias"]
    return [*outside, *block_keys(names)]


def region_weights(tensors: Tensors, prefix: str = "") -> Tensors:
    """The tensors of an original ViT-4K whose keys start with `prefix`, under our names."""
    phi = f"{prefix}phi.0."
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(phi)}
    weights = {f"vit.{name}": weight for name, weight in vit_weights(rest, prefix).items()}
    weights[f"{PROJECTION}.weight"] = tensors[f"{phi}weight"][:, :, None, None]
    weights[f"{PROJECTION}.bias"] = tensors[f"{phi}bias"]
    return weights


def region_config(tensors: Tensors, num_heads: int | None = None) -> HiptRegionConfig:
    """The configuration of an original ViT-4K. Its table stays as it is, and is interpolated by DINO's rule for any grid."""
    width, input_size = tensors["phi.0.weight"].shape
    fields = layer_fields(tensors, width, "blocks", num_heads or REGION_HEADS)
    if not fields.pop("qkv_bias"):
        raise UserError("blocks.0.attn.qkv.bias is not there: a ViT-4K has one")
    return HiptRegionConfig(
        input_size=input_size, grid_size=table_edge(tensors["pos_embed"]), dino_interpolation=True, **fields
    )


def whole_region_encoder(tensors: Tensors, num_heads: int | None = None) -> HiptRegionModel:
    """The second level with these original tensors. Raises UserError when their shapes are not those of a ViT-4K."""
    config = region_config(tensors, num_heads)
    with torch.device("meta"):
        model = HiptRegionModel(config)
    return with_weights(model, region_weights(tensors))


def hierarchy_of(tiles: ViTModel, regions: HiptRegionModel, mean: list[float], std: list[float]) -> HiptModel:
    """Both levels as one model, whose tiles have the size that the tile encoder's table of positions is made for.

    Raises UserError when the second level takes features of another length.
    """
    if regions.config.input_size != tiles.config.hidden_size:
        raise UserError(
            f"the second level takes features of length {regions.config.input_size}, and the first gives "
            f"{tiles.config.hidden_size}: pass two files that belong together"
        )
    white = [(1 - each) / deviation for each, deviation in zip(mean, std)]
    config = HiptConfig(tiles.config, regions.config, tile_size=tiles.config.image_size, white=white)
    with torch.device("meta"):
        model = HiptModel(config)
    parts = {"tile_encoder": tiles, "region_encoder": regions}
    weights = {f"{part}.{name}": weight for part, of in parts.items() for name, weight in of.state_dict().items()}
    return with_weights(model, weights)
