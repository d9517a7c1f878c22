"""Tiles streamed from slides in an order that is random, the same for every run, and can be entered anywhere.

Coordinates are shuffled, never pixels. A row of the block table is a block: a slide and the corners of a few
neighbouring tiles, which share stored pixels. Each epoch has its own permutation of the blocks. `window` consecutive
blocks of it are a window; windows are numbered through all epochs, and window w belongs to rank `w % world` and there to
worker `(w // world) % workers`, which reads it whole and mixes its tiles. So the place in the stream is one number, plus
an offset inside the window.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from ..errors import SlideError, UserError
from ..slides.grid import TileGrid
from ..slides.reader import Slide


OPEN_SLIDES = 32  # handles that one worker keeps open


def block_table(grids: Sequence[TileGrid], block: int) -> Dataset:
    """One row per block of `block` x `block` neighbouring tiles: `slide`, its index in `grids`, and `xy`, a list of corners.

    Raises UserError when the grids differ in tile size or resolution.
    """
    kinds = {(grid.size, grid.mpp) for grid in grids}
    if len(kinds) != 1:
        raise UserError(f"the grids differ in tile size and mpp ({sorted(kinds)}): make them again with one of each")
    slides: list[int] = []
    corners: list[list[list[int]]] = []
    for index, grid in enumerate(grids):
        cells = grid.cells // block
        _, first, inverse = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(inverse.ravel(), kind="stable")
        bounds = np.cumsum(np.bincount(inverse.ravel(), minlength=len(first)))[:-1]
        for members in np.split(order, bounds):
            slides.append(index)
            corners.append(grid.xy[members].tolist())
    return Dataset.from_dict({"slide": slides, "xy": corners})


def stream_tiles(
    table: Dataset,
    grids: Sequence[TileGrid],
    paths: Sequence[str | Path],
    *,
    window: int,
    seed: int,
    starts: Sequence[tuple[int, int]],
    step: int,
) -> IterableDataset:
    """An endless stream of tiles, as rows of `tile` (uint8 (size, size, 3)), `slide`, `xy`, `epoch`, `window`, `offset`.

    Args:
        table: of `block_table(grids, ...)`.
        paths: where the slide of each grid is.
        window: blocks that are read and mixed together.
        seed: of the order.
        starts: for each worker of this rank, the first window it reads and how many of that window's tiles it skips.
        step: distance between two windows of a worker: ranks times workers.

    Tiles that cannot be read are left out, as if the slide did not have them.
    """
    windows = IterableDataset.from_generator(
        _windows,
        gen_kwargs={"starts": list(starts), "step": step, "blocks": len(table), "window": window, "seed": seed},
    )
    slides = [Slide(path, grid.slide_mpp) for path, grid in zip(paths, grids)]
    keys = [grid.slide for grid in grids]
    read = WindowReader(table, slides, keys, size=grids[0].size, mpp=grids[0].mpp, seed=seed)
    return windows.map(read, batched=True, batch_size=1, remove_columns=["epoch", "window", "blocks", "skip"])


def _windows(
    starts: list[tuple[int, int]], step: int, blocks: int, window: int, seed: int
) -> Iterator[dict[str, Any]]:
    """The windows of one worker, endlessly; `datasets` hands each worker its own entry of `starts`."""
    per_epoch = -(-blocks // window)
    for number, skip in starts:
        current, order = -1, np.empty(0, int)
        while True:
            epoch, place = divmod(number, per_epoch)
            if epoch != current:
                current, order = epoch, np.random.default_rng((seed, epoch)).permutation(blocks)
            rows = order[place * window : (place + 1) * window]
            yield {"epoch": epoch, "window": number, "blocks": rows.tolist(), "skip": skip}
            number, skip = number + step, 0


class WindowReader:
    """Reads the tiles of a window and mixes them; keeps the last slides open."""

    def __init__(
        self, table: Dataset, slides: Sequence[Slide], keys: Sequence[str], *, size: int, mpp: float, seed: int
    ):
        self.table, self.slides, self.keys = table, slides, keys
        self.size, self.mpp, self.seed = size, mpp, seed
        self._open: OrderedDict[int, Slide] = OrderedDict()

    def __call__(self, windows: dict[str, list]) -> dict[str, list]:
        """The mixed tiles of one window, given as a batch of one row."""
        epoch, number, skip = windows["epoch"][0], windows["window"][0], windows["skip"][0]
        rows = self.table[windows["blocks"][0]]
        tiles, slides, corners = [], [], []
        for i in np.argsort(rows["slide"], kind="stable"):  # so that each slide is opened once a window
            xy = np.asarray(rows["xy"][i], np.int64)
            tiles += self._read(rows["slide"][i], xy)
            slides += [self.keys[rows["slide"][i]]] * len(xy)
            corners += [xy]
        corners = np.concatenate(corners)
        order = np.random.default_rng((self.seed, epoch, number)).permutation(len(tiles))
        kept = [(offset, i) for offset, i in enumerate(order) if offset >= skip and tiles[i] is not None]
        return {
            "tile": [tiles[i] for _, i in kept],
            "slide": [slides[i] for _, i in kept],
            "xy": [corners[i] for _, i in kept],
            "epoch": [epoch] * len(kept),
            "window": [number] * len(kept),
            "offset": [offset for offset, _ in kept],
        }

    def _read(self, index: int, xy: np.ndarray) -> list[np.ndarray | None]:
        """The tiles of slide `index` at `xy` (N, 2), None for those that cannot be read."""
        slide = self.slides[index]
        self._open[index] = slide
        self._open.move_to_end(index)
        if len(self._open) > OPEN_SLIDES:
            self._open.popitem(last=False)[1].close()
        try:
            tiles, valid = slide.read_tiles(xy, self.size, self.mpp)
        except SlideError:
            return [None] * len(xy)
        return [tile if good else None for tile, good in zip(tiles, valid)]
