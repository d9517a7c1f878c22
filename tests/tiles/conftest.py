"""A small cohort whose tiles say where they come from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.grid import TileGrid, tile_grid
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.tissue import Tissue


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> tuple[Sequence[TileGrid], Sequence[Path]]:
    """Three slides of 8 x 8, 7 x 8 and 6 x 8 tiles of 64 pixels; red tells the slide, green and blue the corner."""
    folder = tmp_path_factory.mktemp("cohort")
    grids, paths = [], []
    for index, columns in enumerate((8, 7, 6)):
        picture = np.zeros((512, columns * 64, 3), np.uint8)
        picture[..., 0] = 60 + 60 * index
        picture[..., 1] = np.repeat(np.arange(columns) * 28 + 20, 64)[None, :]
        picture[..., 2] = np.repeat(np.arange(8) * 28 + 20, 64)[:, None]
        paths.append(folder / f"slide_{index}.svs")
        write_aperio(paths[-1], picture, 0.5, quality=95)
        everywhere = Tissue(np.ones((8, columns), bool), (64.0, 64.0))
        grids.append(tile_grid(Slide(paths[-1]), everywhere, key=paths[-1].name, size=64, mpp=0.5))
    return grids, paths
