"""Blocks of neighbouring tiles: what is read together, because neighbours share stored pixels.

A cohort may have 10,000 slides and 100 million tiles, so nothing is made for tiles that are not read: of each slide only
the number of its blocks is counted, and its blocks are made when one of them is asked for.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import SlideError, UserError
from ..slides.grid import TileGrid
from ..slides.reader import Slide
from .filters import TileFilter


OPEN_SLIDES = 64  # files that one process keeps open
KNOWN_SLIDES = 256  # whose blocks are remembered


@dataclass(frozen=True)
class TileRows:
    """Tiles with what is known of them; lists of the same length.

    Attributes:
        tiles: uint8 (size, size, 3), or None for a tile that could not be read, or that a filter dropped.
        slides: keys of the slides.
        xy: int64 (N, 2), corners in level-0 pixels.
    """

    tiles: list[np.ndarray | None]
    slides: list[str]
    xy: np.ndarray


def count_blocks(grid: TileGrid, block: int) -> int:
    """How many blocks of `block` x `block` tiles have a tile of the grid."""
    cells = grid.cells // block
    columns = int(cells[:, 0].max()) + 1
    taken = np.zeros((int(cells[:, 1].max()) + 1) * columns, bool)
    taken[cells[:, 1] * columns + cells[:, 0]] = True
    return int(np.count_nonzero(taken))


def blocks_of(grid: TileGrid, block: int) -> list[np.ndarray]:
    """For each block of `block` x `block` tiles the rows of the grid that lie in it, row of blocks after row."""
    cells = grid.cells // block
    columns = int(cells[:, 0].max()) + 1
    place = cells[:, 1] * columns + cells[:, 0]
    order = np.argsort(place, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(place[order])) + 1)


class SlideBlocks:
    """The blocks of all slides of a cohort, numbered through, and read when they are asked for.

    Args:
        grids: one for each slide, or several of one slide at different resolutions; all with tiles of one size.
        paths: where the slide of each grid is.
        block: edge of a block in tiles.
        weights: how much more often than others (1) the tiles of each grid are to be seen; None for all the same.
        tile_filter: which tiles are good enough, judged by their pixels.

    Raises UserError when the grids differ in tile size.
    """

    def __init__(
        self,
        grids: Sequence[TileGrid],
        paths: Sequence[str | Path],
        block: int,
        *,
        weights: Sequence[float] | None = None,
        tile_filter: TileFilter | None = None,
    ):
        sizes = {grid.size for grid in grids}
        if len(sizes) != 1:
            raise UserError(f"the grids differ in tile size ({sorted(sizes)} px): make them again with one of each")
        self.grids, self.paths, self.block = grids, paths, block
        self.size, self.tile_filter = sizes.pop(), tile_filter
        counts = np.array([count_blocks(grid, block) for grid in grids])
        self._ends = np.cumsum(counts)
        self.weights = None if weights is None else np.repeat(np.asarray(weights, float), counts)
        self._reported: set[Path] = set()
        self._make_caches()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_slide", "_blocks")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def _make_caches(self) -> None:
        """What was used last stays open: each process has its own."""
        self._slide = lru_cache(OPEN_SLIDES)(lambda index: self.grids[index].open(self.paths[index]))
        self._blocks = lru_cache(KNOWN_SLIDES)(lambda index: blocks_of(self.grids[index], self.block))

    def read(self, numbers: Sequence[int]) -> TileRows:
        """The tiles of these blocks, those of one slide one after the other."""
        rows = TileRows([], [], np.empty((0, 2), np.int64))
        corners = []
        for number in sorted(numbers):
            index = int(np.searchsorted(self._ends, number, side="right"))
            grid = self.grids[index]
            members = self._blocks(index)[number - self._ends[index]]  # counted from the slide's last block
            xy = np.asarray(grid.xy[members])
            rows.tiles.extend(self._read(self._slide(index), xy, grid))
            rows.slides.extend([grid.slide] * len(xy))
            corners.append(xy)
        return TileRows(rows.tiles, rows.slides, np.concatenate(corners))

    def _read(self, slide: Slide, xy: np.ndarray, grid: TileGrid) -> list[np.ndarray | None]:
        try:
            tiles, valid = slide.read_tiles(xy, grid.size, grid.extent)
        except SlideError as error:
            if slide.path not in self._reported:  # once, and not for each of its tiles
                print(f"left out: {error}", file=sys.stderr, flush=True)
            self._reported.add(slide.path)
            return [None] * len(xy)
        keeps = self.tile_filter or (lambda tile: True)
        return [tile if good and keeps(tile) else None for tile, good in zip(tiles, valid)]
