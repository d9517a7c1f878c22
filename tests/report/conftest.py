"""A small cohort, tiled, and a tiny ViT, for the tests of the report."""

from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTModel

from hf_pathology.features.encoder import Encoder
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cohort import CohortSlide
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tiling import GridOptions, tile_cohort


@pytest.fixture(scope="session")
def tiled(tmp_path_factory) -> tuple[Path, list[tuple[CohortSlide, TileGrid]]]:
    """A tiling folder, and two slides of different classes with their grids."""
    folder = tmp_path_factory.mktemp("cohort")
    slides = []
    for seed, label in enumerate(["glandular", "solid"]):
        path = folder / f"{label}.svs"
        write_aperio(path, draw_slide(seed, label, 1024)[0], 0.5)
        slides.append(CohortSlide(path.name, path, path.stem, label))
    pairs = list(tile_cohort(slides, folder / "tiles", GridOptions(mpp=1.0, tile_size=32)))
    return folder / "tiles", pairs


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """A ViT of two layers with random weights: tiles of 32 pixels, patches of 8."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, attn_implementation="eager")
    model = ViTModel(config, add_pooling_layer=False).eval()
    return Encoder(model, "tiny", "0", "cls", 32, 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
