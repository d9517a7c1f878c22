"""Views of a tile for self-supervised training: crops as uint8, drawn together with the numbers of their colour changes.

The crops are made by the loader's workers, the colour changes on the accelerator (`photometric.py`). All that is random
is drawn here, from a generator seeded by the run, the epoch, the slide and the corner of the tile: a view does not
depend on the batch, the worker or the number of processes, and nothing of it has to be saved to resume. The numbers of
all views of a tile are drawn at once: one by one they would cost as much time as the crops.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from ..errors import UserError, require_at_least
from .hidden import HiddenPatches


# The columns of the numbers of a view's colour changes.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # factors of the jitter, in the numbering of its order
ORDER = slice(4, 8)  # which of the four comes first, second ...
GRAY, BLUR, SOLARIZE = 8, 9, 10  # 0 or 1; standard deviation in pixels, 0 for none; 0 or 1
STAIN_FACTORS, STAIN_SHIFTS = slice(11, 14), slice(14, 17)  # of haematoxylin, eosin, DAB; 1 and 0 for no change
COLUMNS = 17
ATTEMPTS = 10  # to draw a box that lies inside the tile


@dataclass
class ViewOptions:
    """The views of iBOT as published; DINO's differ in `global_scale` (0.4, 1), `local_scale` (0.05, 0.4), `local_views` (8).

    Attributes:
        global_size, local_size: edges of the views in pixels.
        global_views, local_views: how many of each a tile has; MAE has one global view and no local ones.
        global_scale, local_scale: smallest and largest share of the tile's area that a view shows.
        ratio: smallest and largest width over height of what a view shows, before it is made square.
        native_crops: keep the tile's magnification: the scales are then shares of the view's own area in pixels of the
            tile. As Virchow2 (arXiv 2408.00738): scales of (0.9, 1.1), a ratio of (0.95, 1.05), tiles of 392 pixels for
            views of 224.
        vertical_flip, quarter_turns: also turn views upside down, and by multiples of 90 degrees; the published views
            are flipped left to right only.
        jitter: how far brightness, contrast and saturation (as factors) and hue (as a turn) are changed, with
            `jitter_probability`.
        gray: probability of losing the colour.
        blur: probability for the first global view, the other global ones, and local ones.
        blur_sigma: smallest and largest standard deviation of the blur, in pixels of the view. The published ones are
            meant for views of 224 and 96 pixels.
        solarize: probability for the second global view.
        hed: how far the stains haematoxylin, eosin and DAB are changed, with `hed_probability` (Tellez et al. 2018,
            doi 10.1109/TMI.2018.2820199): each as a factor, and by a shift of the optical density. 0.05 is light.
        mean, std: of the channels, between 0 and 1, for normalisation; ImageNet's. They are saved with the encoder.

    Raises UserError for a value that makes no sense, with its name.
    """

    global_size: int = 224
    local_size: int = 96
    global_views: int = 2
    local_views: int = 10
    global_scale: list[float] = field(default_factory=lambda: [0.25, 1.0])
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.25])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    native_crops: bool = False
    vertical_flip: bool = False
    quarter_turns: bool = False
    jitter: list[float] = field(default_factory=lambda: [0.4, 0.4, 0.2, 0.1])
    jitter_probability: float = 0.8
    gray: float = 0.2
    blur: list[float] = field(default_factory=lambda: [1.0, 0.1, 0.5])
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])
    solarize: float = 0.2
    hed: float = 0.0
    hed_probability: float = 0.5
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])

    def __post_init__(self):
        require_at_least(1, global_size=self.global_size, local_size=self.local_size, global_views=self.global_views)
        require_at_least(0, local_views=self.local_views)
        scales = {"global_scale": self.global_scale, "local_scale": self.local_scale}
        if not self.local_views:
            del scales["local_scale"]
        if self.native_crops:  # outside of these, a view would not show the tile's magnification, nor nearly
            require_numbers(0.5, 2.0, 2, rising=True, **scales)
        else:
            require_numbers(0.001, 1.0, 2, rising=True, **scales)
        require_numbers(0.01, 100.0, 2, rising=True, ratio=self.ratio, blur_sigma=self.blur_sigma)
        require_numbers(0.0, 1.0, 3, blur=self.blur, mean=self.mean)
        require_numbers(0.001, math.inf, 3, std=self.std)
        require_numbers(0.0, math.inf, 4, jitter=self.jitter)
        if self.jitter[HUE] > 0.5:
            raise UserError(f"jitter is {self.jitter}: its last number, a turn of the hue, must be at most 0.5")
        for name in ("jitter_probability", "gray", "solarize", "hed", "hed_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be between 0 and 1")

    def check_tile_size(self, tile_size: int) -> None:
        """Raises UserError when native crops would not fit into tiles of `tile_size` pixels."""
        if not self.native_crops:
            return
        stretch = max(self.ratio[1], 1 / self.ratio[0])
        views = [(self.global_size, self.global_scale), (self.local_size, self.local_scale)]
        needed = max(
            math.ceil(size * math.sqrt(scale[1] * stretch)) for size, scale in views[: 2 if self.local_views else 1]
        )
        if tile_size < needed:
            raise UserError(
                f"native_crops keeps the magnification, and its views show up to {needed} pixels of a tile, but "
                f"tile_size is {tile_size}: choose a tile_size of at least {needed}, or smaller views"
            )


def require_numbers(least: float, most: float, count: int, rising: bool = False, **options: Sequence[float]) -> None:
    """Raises UserError for the first of the named `options` that is not `count` numbers from `least` to `most`."""
    for name, numbers in options.items():
        inside = [isinstance(number, int | float) and least <= number <= most for number in numbers]
        if len(inside) != count or not all(inside) or (rising and sorted(numbers) != list(numbers)):
            order = ", the smaller first" if rising else ""
            raise UserError(f"{name} is {numbers}: it must be {count} numbers from {least} to {most}{order}")


class MultiCrop:
    """Makes the views of one row of the stream.

    Args:
        options: see `ViewOptions`.
        seed: of the run.
        hidden: draws the hidden patches of each global view; None where the method hides none, or draws them itself.
    """

    def __init__(self, options: ViewOptions, seed: int, hidden: HiddenPatches | None = None):
        self.options, self.seed, self.hidden = options, seed, hidden
        kinds = np.repeat([0, 1], [options.global_views, options.local_views])  # of each view: 0 global, 1 local
        self.sizes = np.array([options.global_size, options.local_size])[kinds]  # (V,)
        self.scales = np.array([options.global_scale, options.local_scale])[kinds]  # (V, 2)
        first, other, local = options.blur
        self.blur = np.array([other, local])[kinds]
        self.blur[0] = first
        self.solarize = np.zeros(len(kinds))
        self.solarize[1 : options.global_views][:1] = options.solarize

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Views of the row's `tile`, uint8 (V, size, size, 3), their colour numbers (V, COLUMNS), and what is hidden.

        `global_views` and `global_colours`; with local views `local_views` and `local_colours`; with hidden patches
        `hidden`, bool (global views, h, w). Raises UserError when the tile is too small for native crops.
        """
        options, tile = self.options, row["tile"]
        height, width = tile.shape[:2]
        options.check_tile_size(min(height, width))
        x, y = (int(edge) for edge in row["xy"])
        rng = np.random.default_rng((self.seed, row["epoch"], zlib.crc32(row["slide"].encode()), x, y))

        whole = self.sizes[:, None] ** 2 if options.native_crops else height * width
        boxes = draw_boxes(height, width, self.scales * whole, options.ratio, rng)
        turns = draw_turns(len(boxes), options.vertical_flip, options.quarter_turns, rng)
        colours = draw_colours(options, self.blur, self.solarize, rng)

        sizes = self.sizes.tolist()
        crops = [
            turned(resized(tile[top : top + high, left : left + wide], size), *turn)
            for size, (top, left, high, wide), turn in zip(sizes, boxes.tolist(), turns.tolist())
        ]
        n_global = options.global_views
        views = {"global_views": np.stack(crops[:n_global]), "global_colours": colours[:n_global]}
        if options.local_views:
            views |= {"local_views": np.stack(crops[n_global:]), "local_colours": colours[n_global:]}
        if self.hidden is not None:
            views["hidden"] = np.stack([self.hidden.draw(rng) for _ in range(n_global)])
        return views


def draw_boxes(
    height: int, width: int, areas: np.ndarray, ratio: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """Top, left, height and width of a random box for each row of `areas` (V, 2): the smallest and largest, in pixels.

    int (V, 4), by torchvision's rule for `RandomResizedCrop`: the first of `ATTEMPTS` that lies inside the picture of
    `height` x `width`, or the largest box in its middle whose width over height is within `ratio`.
    """
    least, most = areas[:, :1], areas[:, 1:]
    area = least + (most - least) * rng.random((len(areas), ATTEMPTS))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    stretch = np.exp(0.5 * (low + (high - low) * rng.random((len(areas), ATTEMPTS))))  # the root of width over height
    edge = np.sqrt(area)
    size = np.stack([edge / stretch, edge * stretch]).round().astype(np.int64)  # heights and widths (2, V, ATTEMPTS)
    picture = np.array([height, width])
    fits = ((size > 0) & (size <= picture[:, None, None])).all(0)
    size = size[:, np.arange(len(areas)), fits.argmax(1)]  # of the first that fits
    corner = rng.random((2, len(areas))) * (picture[:, None] - size + 1)
    if not fits.any(1).all():
        largest = np.array([min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))])[:, None]
        size = np.where(fits.any(1), size, largest)
        corner = np.where(fits.any(1), corner, (picture[:, None] - largest) // 2)
    return np.concatenate([corner.astype(np.int64), size]).T


def draw_turns(count: int, vertical_flip: bool, quarter_turns: bool, rng: np.random.Generator) -> np.ndarray:
    """How `count` views are turned, int (count, 3): mirrored, upside down (0 or 1), and how many quarter turns."""
    return (rng.random((count, 3)) * [2, 1 + vertical_flip, 4 if quarter_turns else 1]).astype(np.int64)


def draw_colours(options: ViewOptions, blur: np.ndarray, solarize: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The numbers of the colour changes of views, float32 (V, COLUMNS), drawn as DINO and iBOT do.

    All but the probabilities of `blur` and `solarize`, float (V,), are the same for all views.
    """
    count = len(blur)
    chance = rng.random((5, count))
    amount = rng.random((count, 15))
    colours = np.zeros((count, COLUMNS), np.float32)

    jitter, neutral = np.array(options.jitter), np.array([1.0, 1.0, 1.0, 0.0])
    least, most = np.maximum(neutral - jitter, [0.0, 0.0, 0.0, -0.5]), neutral + jitter
    jittered = (chance[0] < options.jitter_probability)[:, None]
    colours[:, :4] = np.where(jittered, least + (most - least) * amount[:, :4], neutral)
    colours[:, ORDER] = amount[:, 4:8].argsort(axis=1)

    colours[:, GRAY] = chance[1] < options.gray
    low, high = options.blur_sigma
    colours[:, BLUR] = np.where(chance[2] < blur, low + (high - low) * amount[:, 8], 0.0)
    colours[:, SOLARIZE] = chance[3] < solarize
    stains = options.hed * (2 * amount[:, 9:15] - 1) * (chance[4] < options.hed_probability)[:, None]
    colours[:, STAIN_FACTORS], colours[:, STAIN_SHIFTS] = 1 + stains[:, :3], stains[:, 3:]
    return colours


def resized(crop: np.ndarray, size: int) -> np.ndarray:
    """`crop`, uint8 (h, w, 3), as a square of `size`, uint8 (size, size, 3): bicubic with antialiasing, as Pillow's.

    It is what torchvision's `resize` calls, which loses the memory format of a single picture, and with it half the time.
    """
    if crop.shape[:2] == (size, size):
        return crop
    pixels = torch.from_numpy(crop.copy())[None].permute(0, 3, 1, 2)  # (1, 3, h, w) with the memory of (1, h, w, 3)
    return interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def turned(view: np.ndarray, mirrored: int, upside_down: int, quarters: int) -> np.ndarray:
    """`view` (h, w, 3) mirrored left to right, then upside down, then turned to the right by quarter turns."""
    if mirrored or upside_down:
        view = cv2.flip(view, -1 if mirrored and upside_down else mirrored)
    return cv2.rotate(view, quarters - 1) if quarters else view
