"""Slides made for the tests of the slide pillar."""

from pathlib import Path

import numpy as np
import pytest

from hf_pathology.slides.aperio import write_aperio


def ramp(width: int, height: int) -> np.ndarray:
    """A picture whose colour says where a pixel is: red rises with x, green with y, slowly enough for JPEG."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8)


@pytest.fixture(scope="session")
def ramp_slide(tmp_path_factory) -> Path:
    """A slide of 2048 x 1536 pixels at 0.25 mpp with two levels, whose colours say where a pixel is."""
    path = tmp_path_factory.mktemp("ramp") / "ramp.svs"
    write_aperio(path, ramp(2048, 1536), 0.25, quality=95, downsamples=(1, 4))
    return path
