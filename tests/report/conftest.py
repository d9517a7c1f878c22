"""A small cohort, tiled, and a tiny ViT, for the tests of the report."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

from hf_pathology.evaluation.cross_validation import CrossValidation, score_folds
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


@pytest.fixture(scope="session")
def validation() -> Callable[..., CrossValidation]:
    """A function that makes a cross-validation of 10 cases of each class, favouring the truth by `separation`."""

    def make(separation: float, classes: tuple[str, ...] = ("a", "b"), seed: int = 0) -> CrossValidation:
        targets = np.arange(10 * len(classes)) % len(classes)
        names = [f"slide {index}" for index in range(len(targets))]
        logits = np.random.default_rng(seed).normal(size=(len(targets), len(classes)))
        logits[np.arange(len(targets)), targets] += separation
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        fold = np.arange(len(targets)) // len(classes) % 2
        labels = [classes[target] for target in targets]
        return score_folds(names, names, labels, fold=fold, probabilities=probabilities, seed=0)

    return make
