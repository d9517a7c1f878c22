"""A masked autoencoder with its decoder, as MAE's code names it (He et al. 2021, arXiv 2111.06377)."""

from collections.abc import Iterable
from typing import Any

import torch

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.conversion.original_vit import (
    block_keys,
    index_in,
    vit_config,
    vit_keys,
    vit_names,
    with_weights,
)
from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.modeling_mae import MaeForPreTraining


Tensors = dict[str, torch.Tensor]

DECODER = "decoder_blocks"
DECODER_HEADS = 16  # of all published decoders, which are 512 wide
DECODER_OUTSIDE = (
    "mask_token",
    "decoder_pos_embed",
    *(f"{part}.{kind}" for part in ("decoder_embed", "decoder_norm", "decoder_pred") for kind in ("weight", "bias")),
)


def mae_names(key: str) -> tuple[str, ...]:
    """What transformers calls the original parameter `key`: three names where it fuses query, key and value."""
    if key.startswith(f"{DECODER}."):
        return tuple(f"decoder.decoder_{name}" for name in vit_names(key.removeprefix("decoder_")))
    if key.startswith(("decoder_", "mask_token")):
        return (f"decoder.{key}",)
    return tuple(f"vit.{name}" for name in vit_names(key))


def mae_keys(names: Iterable[str]) -> list[str]:
    """The keys of an original autoencoder, with as many layers as `names` has."""
    names = set(names)
    return [*vit_keys(names), *DECODER_OUTSIDE, *block_keys(names, DECODER)]


def mae_weights(tensors: Tensors) -> Tensors:
    """The tensors of an original autoencoder under transformers' names."""
    weights = {}
    for key, tensor in tensors.items():
        names = mae_names(key)
        weights |= dict(zip(names, tensor.chunk(len(names))))
    return weights


def mae_config(
    tensors: Tensors, settings: dict[str, Any], num_heads: int | None = None, decoder_heads: int | None = None
) -> MaeConfig:
    """The configuration of an original autoencoder.

    Args:
        settings: of the run that made it, of which `mask_ratio` and `norm_pix_loss` are used where they are there.
    """
    width = len(tensors["decoder_embed.weight"])
    heads = decoder_heads or DECODER_HEADS
    if width % heads:
        raise UserError(f"{heads} heads do not divide the decoder's width of {width}: pass --decoder-heads")
    ratio, norm_pix_loss = settings.get("mask_ratio"), settings.get("norm_pix_loss")
    stated: dict[str, Any] = {}
    if isinstance(ratio, float) and 0 < ratio < 1:
        stated["mask_ratio"] = ratio
    if isinstance(norm_pix_loss, bool):
        stated["norm_pix_loss"] = norm_pix_loss
    return MaeConfig(
        vit_config(tensors, num_heads),
        decoder_hidden_size=width,
        decoder_num_hidden_layers=1 + max(index_in(name, DECODER) for name in tensors),
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=len(tensors[f"{DECODER}.0.mlp.fc1.weight"]),
        **stated,
    )


def whole_mae(tensors: Tensors, config: MaeConfig) -> MaeForPreTraining:
    """The autoencoder with these original tensors. Raises UserError when their shapes are not those of `config`."""
    with torch.device("meta"):
        model = MaeForPreTraining(config)
    return with_weights(model, {f"autoencoder.{name}": weight for name, weight in mae_weights(tensors).items()})
