"""The original HIPT's weights in our model."""

import torch
from originals import vit_config

from hf_pathology.hub_upload.conversion.original_hipt import region_weights
from hf_pathology.hub_upload.conversion.original_vit import vit_weights
from hf_pathology.modeling.configuration_hipt import HiptConfig, HiptRegionConfig
from hf_pathology.modeling.modeling_hipt import HiptModel, HiptRegionModel
from hf_pathology.modeling.position import dino_position_table


def region_config(arguments: dict) -> HiptRegionConfig:
    return HiptRegionConfig(
        input_size=arguments["input_embed_dim"],
        hidden_size=arguments["output_embed_dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        intermediate_size=arguments["mlp_ratio"] * arguments["output_embed_dim"],
        grid_size=arguments["img_size"][0] // 16,
        dino_interpolation=True,
    )


def region_model(state: dict[str, torch.Tensor], arguments: dict, prefix: str = "vit4k.") -> HiptRegionModel:
    model = HiptRegionModel(region_config(arguments))
    model.load_state_dict(region_weights(state, prefix))
    return model.eval()


def hipt_model(state: dict[str, torch.Tensor], tile: dict, region: dict, **options) -> HiptModel:
    """Both levels, the tile encoder's table of positions baked for 256 px."""
    tile_config = vit_config(tile)
    tile_config.image_size = 256
    model = HiptModel(HiptConfig(tile_config, region_config(region), **options))
    weights = vit_weights(state, "vit256.")
    table = "embeddings.position_embeddings"
    weights[table] = dino_position_table(weights[table], (16, 16))
    model.tile_encoder.load_state_dict(weights)
    model.region_encoder.load_state_dict(region_weights(state, "vit4k."))
    return model.eval()


SLIDE_NAMES = {
    "global_phi.0": "embed.0",
    "global_transformer": "transformer",
    "global_attn_pool.attention_a.0": "attention.value",
    "global_attn_pool.attention_b.0": "attention.gate",
    "global_attn_pool.attention_c": "attention.score",
    "global_rho.0": "rho.0",
    "classifier": "classifier",
    "local_phi.0": "regions.embed.0",
    "local_attn_pool.attention_a.0": "regions.attention.value",
    "local_attn_pool.attention_b.0": "regions.attention.gate",
    "local_attn_pool.attention_c": "regions.attention.score",
}


def slide_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of an original slide classifier under our names."""
    weights = {}
    for key, tensor in state.items():
        for original, ours in SLIDE_NAMES.items():
            if key.startswith(f"{original}."):
                weights[ours + key.removeprefix(original)] = tensor
    if any(key.startswith("local_vit.") for key in state):
        weights |= {f"regions.encoder.{name}": tensor for name, tensor in region_weights(state, "local_vit.").items()}
    return weights
