"""A hierarchy of a few thousand weights for tests, released as a user's."""

from pathlib import Path

import torch
from transformers import ViTConfig

from hf_pathology.hub_upload.export_hipt import export_hipt
from hf_pathology.modeling.configuration_hipt import HiptConfig, HiptRegionConfig
from hf_pathology.modeling.modeling_hipt import HiptModel


TILE, REGION = 32, 4  # pixels along a tile, tiles along a region


def release_hierarchy(folder: Path) -> Path:
    """The folder of a release whose weights are not where they start."""
    torch.manual_seed(0)
    tile = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=TILE,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    region = HiptRegionConfig(
        input_size=16,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        grid_size=REGION,
    )
    model = HiptModel(HiptConfig(tile, region, tile_size=TILE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    half = [0.5, 0.5, 0.5]
    return export_hipt(model.eval(), folder, region=REGION, mpp=0.5, mean=half, std=half)
