"""A feature folder of regions for the recipes of the second level, made as a user makes it, but for its size."""

from pathlib import Path

import torch
from transformers import ViTConfig, ViTModel

from hf_pathology.features.embed import embed_cohort
from hf_pathology.features.encoder import load_encoder
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cohort import find_slides
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tiling import GridOptions, tile_cohort


REGION = 4  # tiles along an edge of a region
TILE = 32  # pixels along an edge of a tile


def make_region_features(folder: Path, slides: int = 3, edge: int = 768) -> tuple[Path, Path]:
    """The folder of features and that of the tile encoder that made them."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=TILE, patch_size=8
    )
    vit = ViTModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    half = [0.5, 0.5, 0.5]
    release = export_encoder(vit, folder / "encoder", tile_size=TILE, mpp=0.5, mean=half, std=half)
    for number in range(slides):
        label = ("glandular", "solid")[number % 2]
        write_aperio(folder / "slides" / f"{number}.svs", draw_slide(number, label, edge)[0], 0.5)
    options = GridOptions(mpp=0.5, tile_size=TILE, region=REGION, min_tissue=0.0)
    pairs = list(tile_cohort(find_slides(folder / "slides"), folder / "tiles", options))
    for _, result in embed_cohort(pairs, load_encoder(release), folder / "features"):
        assert not isinstance(result, Exception), result
    return folder / "features", release
