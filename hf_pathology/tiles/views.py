"""Views of a tile for self-distillation: crops as uint8, drawn together with the numbers of their colour changes.

The crops are made by the loader's workers, the colour changes on the accelerator (`photometric.py`). All that is random
is drawn here, from a generator seeded by the run, the epoch, the slide and the corner of the tile: a view does not
depend on the batch, the worker or the number of processes, and nothing of it has to be saved to resume.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .hidden import draw_hidden_blocks, draw_hidden_share


# The columns of the numbers of a view's colour changes.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # factors of the jitter, in the numbering of its order
ORDER = slice(4, 8)  # which of the four comes first, second ...
GRAY, BLUR, SOLARIZE = 8, 9, 10  # 0 or 1; standard deviation in pixels, 0 for none; 0 or 1
COLUMNS = 11


@dataclass
class ViewOptions:
    """The views of iBOT as published; DINO's differ in `global_scale` (0.4, 1) and `local_scale` (0.05, 0.4).

    Attributes:
        global_size, local_size: edges of the views in pixels.
        local_views: how many local views a tile has, beside its two global ones.
        global_scale, local_scale: smallest and largest share of the tile's area that a view shows.
        vertical_flip, quarter_turns: also turn views upside down, and by multiples of 90 degrees; the published views
            are flipped left to right only.
        hidden_shares, hidden_spreads: each global view hides one of the shares of its patches, varied by its spread.
        jitter: how far brightness, contrast and saturation (as factors) and hue (as a turn) are changed.
        gray: probability of losing the colour.
        blur: probability for the first global view, the second, and local ones. The blur, of up to 2 pixels, is meant for
            views of 224 and 96 pixels.
        solarize: probability for the second global view.
        mean, std: of the channels, between 0 and 1, for normalisation; ImageNet's. They are saved with the encoder.
    """

    global_size: int = 224
    local_size: int = 96
    local_views: int = 10
    global_scale: list[float] = field(default_factory=lambda: [0.25, 1.0])
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.25])
    vertical_flip: bool = False
    quarter_turns: bool = False
    hidden_shares: list[float] = field(default_factory=lambda: [0.0, 0.3])
    hidden_spreads: list[float] = field(default_factory=lambda: [0.0, 0.2])
    jitter: list[float] = field(default_factory=lambda: [0.4, 0.4, 0.2, 0.1])
    gray: float = 0.2
    blur: list[float] = field(default_factory=lambda: [1.0, 0.1, 0.5])
    solarize: float = 0.2
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])


class MultiCrop:
    """Makes the views of one row of the stream.

    Args:
        options: see `ViewOptions`.
        patch_size: edge of a patch in pixels, for the grid of hidden patches.
        seed: of the run.
    """

    def __init__(self, options: ViewOptions, patch_size: int, seed: int):
        self.options, self.seed = options, seed
        self.grid = options.global_size // patch_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Views of the row's `tile`, uint8 (V, size, size, 3), their colour numbers (V, COLUMNS), and `hidden` (2, h, w)."""
        options = self.options
        tile = torch.from_numpy(row["tile"]).permute(2, 0, 1)  # (3, h, w), with the memory of (h, w, 3)
        x, y = (int(edge) for edge in row["xy"])
        rng = np.random.default_rng((self.seed, row["epoch"], zlib.crc32(row["slide"].encode()), x, y))
        global_crops = [self._crop(tile, options.global_size, options.global_scale, rng) for _ in range(2)]
        local_crops = [
            self._crop(tile, options.local_size, options.local_scale, rng) for _ in range(options.local_views)
        ]
        first, second, local = options.blur
        colours = [self._colours(rng, first), self._colours(rng, second, options.solarize)]
        views = {"global_views": np.stack(global_crops), "global_colours": np.stack(colours)}
        if local_crops:
            views["local_views"] = np.stack(local_crops)
            views["local_colours"] = np.stack([self._colours(rng, local) for _ in local_crops])
        return {**views, "hidden": np.stack([self._hidden(rng) for _ in range(2)])}

    def _colours(self, rng: np.random.Generator, blur: float, solarize: float = 0.0) -> np.ndarray:
        options = self.options
        return draw_colours(rng, blur=blur, solarize=solarize, jitter=options.jitter, gray=options.gray)

    def _hidden(self, rng: np.random.Generator) -> np.ndarray:
        share = draw_hidden_share(self.options.hidden_shares, self.options.hidden_spreads, rng)
        return draw_hidden_blocks(self.grid, self.grid, share, rng)

    def _crop(self, tile: torch.Tensor, size: int, scale: Sequence[float], rng: np.random.Generator) -> np.ndarray:
        """One random crop, resized and turned, uint8 (size, size, 3)."""
        top, left, height, width = draw_crop(tile.shape[1], tile.shape[2], scale, rng)
        view = F.resized_crop(
            tile, top, left, height, width, [size, size], InterpolationMode.BICUBIC, antialias=True
        ).permute(1, 2, 0)
        turned = view.numpy()
        if rng.random() < 0.5:
            turned = turned[:, ::-1]
        if self.options.vertical_flip and rng.random() < 0.5:
            turned = turned[::-1]
        if self.options.quarter_turns:
            turned = np.rot90(turned, rng.integers(4))
        return np.ascontiguousarray(turned)


def draw_crop(
    height: int, width: int, scale: Sequence[float], rng: np.random.Generator, ratio: Sequence[float] = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random box, by torchvision's rule for `RandomResizedCrop`."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            return int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1)), high, wide
    edge = min(height, width)
    return (height - edge) // 2, (width - edge) // 2, edge, edge


def draw_colours(
    rng: np.random.Generator,
    *,
    blur: float,
    solarize: float,
    jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1),
    gray: float = 0.2,
) -> np.ndarray:
    """The numbers of one view's colour changes, float32 (COLUMNS,), drawn as DINO and iBOT do.

    `jitter` with probability 0.8, in random order; grey with probability `gray`; Gaussian blur of a standard
    deviation between 0.1 and 2 pixels with probability `blur`; inversion above one half with probability `solarize`.
    """
    colours = np.zeros(COLUMNS, np.float32)
    colours[[BRIGHTNESS, CONTRAST, SATURATION]] = 1.0
    if rng.random() < 0.8:
        middle, reach = np.array([1.0, 1.0, 1.0, 0.0]), np.array(jitter)
        colours[:4] = rng.uniform(middle - reach, middle + reach)
    colours[ORDER] = rng.permutation(4)
    colours[GRAY] = rng.random() < gray
    sigma = rng.uniform(0.1, 2.0)
    colours[BLUR] = sigma if rng.random() < blur else 0.0
    colours[SOLARIZE] = rng.random() < solarize
    return colours
