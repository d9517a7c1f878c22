"""Tiles streamed in an order that is random, the same for every run, and can be entered anywhere.

Coordinates are shuffled, never pixels. What is read together is a block: neighbouring tiles of a slide (`blocks.py`), or a
run of tiles in a shard (`shards.py`). Each epoch has its own order of the blocks. `window` consecutive blocks of it are a
window; windows are numbered through all epochs, and window w belongs to rank `w % world` and there to worker
`(w // world) % workers`, which reads it whole and mixes its tiles. So the place in the stream is one number, plus an
offset inside the window.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from datasets import IterableDataset

from ..errors import UserError
from .blocks import TileRows


class TileSource(Protocol):
    """What can be streamed: blocks of tiles that are numbered and read by their numbers.

    Attributes:
        weights: how often each block is to be seen compared with others, (blocks,), or None for all the same.
    """

    weights: np.ndarray | None

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int]) -> TileRows: ...


def stream_tiles(
    source: TileSource, *, window: int, seed: int, starts: Sequence[tuple[int, int]], step: int
) -> IterableDataset:
    """An endless stream of tiles, as rows of `tile` (uint8 (size, size, 3)), `slide`, `xy`, `epoch`, `window`, `offset`.

    Args:
        source: of the blocks.
        window: blocks that are read and mixed together.
        seed: of the order.
        starts: for each worker of this rank, the first window it reads and how many of that window's tiles it skips.
        step: distance between two windows of a worker: ranks times workers.

    Tiles that cannot be read are left out, as if the slide did not have them.
    """
    order = BlockOrder(len(source), source.weights, seed)  # and not `source`, of which `datasets` would make a hash
    windows = IterableDataset.from_generator(
        _windows, gen_kwargs={"starts": list(starts), "step": step, "order": order, "window": window}
    )
    read = WindowReader(source, window, seed)
    return windows.map(read, batched=True, batch_size=1, remove_columns=["epoch", "window", "blocks", "skip"])


@dataclass(frozen=True)
class BlockOrder:
    """In which order each epoch reads the blocks.

    Attributes:
        blocks: how many there are.
        weights: how often each is to be seen compared with others, (blocks,), or None for all the same.
        seed: of the order.
    """

    blocks: int
    weights: np.ndarray | None
    seed: int

    def of_epoch(self, epoch: int) -> np.ndarray:
        """The blocks of one epoch, int64 (blocks,): each once, in random order; with weights, as often as its weight says.

        With weights an epoch has as many blocks as without. A block comes the whole number of times below or above its
        share (systematic sampling).
        """
        rng = np.random.default_rng((self.seed, epoch))
        if self.weights is None:
            return rng.permutation(self.blocks)
        ends = np.cumsum(self.weights) / np.sum(self.weights) * self.blocks
        drawn = np.searchsorted(ends, np.arange(self.blocks) + rng.random(), side="right")
        return rng.permutation(np.minimum(drawn, self.blocks - 1))  # for the last end, rounded, may be too small


def _windows(starts: list[tuple[int, int]], step: int, order: BlockOrder, window: int) -> Iterator[dict[str, Any]]:
    """The windows of one worker, endlessly; `datasets` hands each worker its own entry of `starts`."""
    per_epoch = -(-order.blocks // window)
    for number, skip in starts:
        current, blocks = -1, np.empty(0, int)
        while True:
            epoch, place = divmod(number, per_epoch)
            if epoch != current:
                current, blocks = epoch, order.of_epoch(epoch)
            chosen = blocks[place * window : (place + 1) * window]
            yield {"epoch": epoch, "window": number, "blocks": chosen.tolist(), "skip": skip}
            number, skip = number + step, 0


class WindowReader:
    """Reads the tiles of a window and mixes them.

    Raises UserError when as many windows in a row as an epoch has held no tile: the stream would go on so for ever.
    """

    def __init__(self, source: TileSource, window: int, seed: int):
        self.source, self.seed = source, seed
        self._windows, self._empty = -(-len(source) // window), 0

    def __call__(self, windows: dict[str, list]) -> dict[str, list]:
        """The mixed tiles of one window, given as a batch of one row."""
        epoch, number, skip = windows["epoch"][0], windows["window"][0], windows["skip"][0]
        rows = self.source.read(windows["blocks"][0])
        order = np.random.default_rng((self.seed, epoch, number)).permutation(len(rows.tiles))
        kept = [(offset, i) for offset, i in enumerate(order) if offset >= skip and rows.tiles[i] is not None]
        self._empty = 0 if kept or skip else self._empty + 1
        if self._empty > self._windows:
            raise UserError("not one tile of a whole epoch could be read, or passed the filters: look at the slides")
        return {
            "tile": [rows.tiles[i] for _, i in kept],
            "slide": [rows.slides[i] for _, i in kept],
            "xy": [rows.xy[i] for _, i in kept],
            "epoch": [epoch] * len(kept),
            "window": [number] * len(kept),
            "offset": [offset for offset, _ in kept],
        }
