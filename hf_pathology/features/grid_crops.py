"""Views of a region for the second level of the hierarchy: crops of its grid of tile features, and their mirror images."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError, require_at_least


@dataclass
class GridCropOptions:
    """The views of HIPT's second level as published: 14 and 6 of 16 tiles, mirrored left to right.

    Attributes:
        global_size, local_size: edges of the crops in tiles.
        global_views, local_views: how many of each a region has.
        vertical_flip, quarter_turns: also turn crops upside down, and by multiples of 90 degrees. The order of the tiles
            is changed, not what the tile encoder said of each.
    """

    global_size: int = 14
    local_size: int = 6
    global_views: int = 2
    local_views: int = 8
    vertical_flip: bool = False
    quarter_turns: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, global_size=self.global_size, local_size=self.local_size, global_views=self.global_views)
        require_at_least(0, local_views=self.local_views)

    def check_grid(self, grid: int) -> None:
        """Raises UserError when the crops do not fit into regions of `grid` x `grid` tiles."""
        for name in ("global_size", "local_size"):
            if getattr(self, name) > grid:
                raise UserError(f"{name} is {getattr(self, name)}, but a region has only {grid} tiles along an edge")


class GridCrops:
    """Makes the views of one region of the stream; what is random depends on the run, the epoch and the region alone."""

    def __init__(self, options: GridCropOptions, seed: int):
        self.options, self.seed = options, seed

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`global_views`, float32 (V, D, size, size), and with local views `local_views`, of the row's `tile` (h, w, D)."""
        options, grid = self.options, row["tile"]
        x, y = (int(edge) for edge in row["xy"])
        rng = np.random.default_rng((self.seed, row["epoch"], zlib.crc32(row["slide"].encode()), x, y))
        views = {}
        for kind, count, size in (
            ("global_views", options.global_views, options.global_size),
            ("local_views", options.local_views, options.local_size),
        ):
            if count:
                views[kind] = np.stack([self._crop(grid, size, rng) for _ in range(count)])
        return views

    def _crop(self, grid: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """A random square of the grid (h, w, D), mirrored or turned, float32 (D, size, size)."""
        top, left = rng.integers(0, [edge - size + 1 for edge in grid.shape[:2]])
        crop = grid[top : top + size, left : left + size]
        mirrored, upside_down, quarters = rng.random(3)
        if mirrored < 0.5:
            crop = crop[:, ::-1]
        if self.options.vertical_flip and upside_down < 0.5:
            crop = crop[::-1]
        if self.options.quarter_turns:
            crop = np.rot90(crop, int(4 * quarters))
        return crop.transpose(2, 0, 1).astype(np.float32)
