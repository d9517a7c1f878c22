"""Batches of views for training, whose place in the stream can be saved and entered again, on any number of ranks."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from .stream import TileSource, stream_tiles


def leave_signals_to_the_main_process(worker: int) -> None:
    """Lets a worker outlive Ctrl-C and SIGTERM, which reach all processes of a job: the main process ends it when done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class TileLoader:
    """An endless iterable of batches of this rank's tiles, made into views by worker processes.

    Args:
        source: of the tiles: the blocks of slides (`SlideBlocks`) or of shards (`ShardBlocks`).
        to_views: makes the row that is batched of a row of the stream (`tile`, `slide`, `xy`, `epoch`).
        batch_size: tiles in a batch.
        window: blocks that are mixed together.
        seed: of the order.
        rank, world: this process, and how many there are.
        workers: processes that read for this rank; with 0 the rank reads by itself.
    """

    def __init__(
        self,
        source: TileSource,
        to_views: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        batch_size: int,
        window: int = 64,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
    ):
        self.source, self.to_views = source, to_views
        self.batch_size, self.window, self.seed = batch_size, window, seed
        self.rank, self.world, self.workers = rank, world, workers
        self._enter(first_window=0)

    @property
    def readers(self) -> int:
        """How many streams this rank reads in turn: one for each worker, and one without any."""
        return max(1, self.workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        turn = [
            (self._turn + i) % self.readers for i in range(self.readers)
        ]  # the DataLoader asks its workers in turn
        stream = stream_tiles(
            self.source,
            window=self.window,
            seed=self.seed,
            starts=[self._places[reader] for reader in turn],
            step=self.world * self.readers,
        )
        loader = DataLoader(
            stream.map(self.to_views, remove_columns=["tile", "epoch"]),
            self.batch_size,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),  # copied to the GPU while it computes
            worker_init_fn=leave_signals_to_the_main_process,
            generator=torch.Generator(),  # its own, for a DataLoader draws a seed, and a resumed run would draw another
        )
        for batch in loader:
            window, offset = batch.pop("window"), batch.pop("offset")
            self._places[self._turn] = (int(window[-1]), int(offset[-1]) + 1)
            self._turn = (self._turn + 1) % self.readers
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """This rank's place after the batches that were handed out, and the layout it holds for."""
        return {"world": self.world, "readers": self.readers, "turn": self._turn, "places": list(self._places)}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Goes to the place that all ranks had saved: exactly in the same layout.

        In another layout, all go on from the first window that was not finished, so that nothing is lost and at most one
        window per reader is read again.
        """
        if len(states) == self.world and states[self.rank]["readers"] == self.readers:
            self._places = [tuple(place) for place in states[self.rank]["places"]]
            self._turn = states[self.rank]["turn"]
        else:
            self._enter(min(window for state in states for window, _ in state["places"]))

    def _enter(self, first_window: int) -> None:
        """Puts every reader of this rank at its first window from `first_window` on."""
        step = self.world * self.readers
        mine = [self.rank + self.world * reader for reader in range(self.readers)]
        self._places = [(first_window + (own - first_window) % step, 0) for own in mine]
        self._turn = 0
