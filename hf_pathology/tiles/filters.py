"""Which tiles are good enough to be trained on, judged by their pixels after they were read."""

from dataclasses import dataclass

import cv2
import numpy as np

from ..errors import require_at_least


STAINED = 20  # HSV saturation, of 255, above which a pixel is stained and not glass or fat


@dataclass
class FilterOptions:
    """What a tile must have; with the defaults, every tile has it.

    Attributes:
        min_stained: share of its pixels that must be stained (HSV saturation above 20 of 255).
        min_brightness, max_brightness: between which its mean HSV value must be, of 255: folds are dark, glass is bright.
        min_sharpness: smallest variance of the Laplacian of its grey values; about 10 to 50 on tissue that is out of focus at
            0.5 mpp, and some hundreds in focus. It depends on resolution and stain: look at your own slides.
    """

    min_stained: float = 0.0
    min_brightness: float = 0.0
    max_brightness: float = 255.0
    min_sharpness: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(0, min_stained=self.min_stained, min_sharpness=self.min_sharpness)


def tile_filter(options: FilterOptions) -> "TileFilter | None":
    """The filter with these options, or None when they keep every tile."""
    return None if options == FilterOptions() else TileFilter(options)


class TileFilter:
    """Says of a tile, uint8 RGB (h, w, 3), whether it is to be kept."""

    def __init__(self, options: FilterOptions):
        self.options = options

    def __call__(self, tile: np.ndarray) -> bool:
        options = self.options
        hsv = cv2.cvtColor(tile, cv2.COLOR_RGB2HSV)
        brightness = hsv[..., 2].mean()
        if not options.min_brightness <= brightness <= options.max_brightness:
            return False
        if (hsv[..., 1] > STAINED).mean() < options.min_stained:
            return False
        return options.min_sharpness == 0 or sharpness(tile) >= options.min_sharpness


def sharpness(tile: np.ndarray) -> float:
    """The variance of the Laplacian of the grey values of `tile`, uint8 RGB (h, w, 3): high where it is in focus."""
    return float(cv2.Laplacian(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY), cv2.CV_16S).var())
