"""Tissue."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tissue:
    """Where the tissue of a slide is: `mask` bool (h, w), True = tissue; `extent` (x, y) level-0 pixels per mask pixel."""

    mask: np.ndarray
    extent: tuple[float, float]
