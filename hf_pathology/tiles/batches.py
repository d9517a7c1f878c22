"""Whole batches of tiles, read by threads into buffers that are used again and again.

Decoding releases Python's lock, so threads serve as well as processes; and a batch that is written where it will be used
costs nothing to hand over, which for a worker process costs more than the decoding.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import SlideError
from ..slides.reader import Slide


@dataclass(frozen=True)
class TileJob:
    """Neighbouring tiles of one slide that are read together.

    Attributes:
        slide: to read from; threads share it.
        xy: int64 (n, 2), corners in level-0 pixels.
        extent: edge (x, y) of a tile in level-0 pixels.
        rows: int64 (n,), where the tiles belong, for whoever asked; 0, 1, 2 ... when None.
        source: what they belong to, for whoever asked.
    """

    slide: Slide
    xy: np.ndarray
    extent: tuple[float, float]
    rows: np.ndarray | None = None
    source: Any = None

    def part(self, start: int, stop: int) -> "TileJob":
        """The job of only these of its tiles."""
        rows = np.arange(len(self.xy)) if self.rows is None else self.rows
        return TileJob(self.slide, self.xy[start:stop], self.extent, rows[start:stop], self.source)


@dataclass
class TileBatch:
    """Tiles of one or more jobs.

    Attributes:
        tiles: uint8 (B, size, size, 3): a buffer that is written over when the next batch is asked for.
        valid: bool (B,), False where a tile could not be read.
        jobs: what was read, in the order of the tiles.
        errors: what went wrong with whole jobs (the slide is gone, or was changed), by their place in `jobs`.
        seconds: that threads spent on reading it.
    """

    tiles: np.ndarray
    valid: np.ndarray
    jobs: list[TileJob]
    errors: dict[int, SlideError]
    seconds: float


def read_batches(
    jobs: Iterable[TileJob], size: int, *, batch_size: int, threads: int = 1, ahead: int = 2, pinned: bool = False
) -> Iterator[TileBatch]:
    """The tiles of all jobs in their order, in batches of `batch_size` (the last may be smaller).

    Args:
        jobs: taken one by one as they are needed, `ahead` batches before their tiles are handed out.
        size: edge of a tile in output pixels.
        threads: that read and decode.
        ahead: batches that are read while one is in use.
        pinned: buffers in page-locked memory, from which an accelerator copies without waiting.
    """
    shape = (ahead + 1, batch_size, size, size, 3)
    ring = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned).numpy()
    pending: deque[tuple[np.ndarray, list[TileJob], list[Future]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tiles")
    try:
        for number, pieces in enumerate(_packed(jobs, batch_size)):
            buffer, start, parts = ring[number % len(ring)], 0, []
            for piece in pieces:
                stop = start + len(piece.xy)
                parts.append(pool.submit(_read, piece, size, buffer[start:stop]))
                start = stop
            pending.append((buffer[:start], pieces, parts))
            if len(pending) == len(ring):
                yield _batch(*pending.popleft())
        while pending:
            yield _batch(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _packed(jobs: Iterable[TileJob], batch_size: int) -> Iterator[list[TileJob]]:
    """The jobs of one batch after the other; a job that does not fit into a batch is continued in the next."""
    pieces, room = [], batch_size
    for job in jobs:
        done = 0
        while done < len(job.xy):
            piece = job.part(done, done + room)
            pieces.append(piece)
            done, room = done + len(piece.xy), room - len(piece.xy)
            if room == 0:
                yield pieces
                pieces, room = [], batch_size
    if pieces:
        yield pieces


def _read(job: TileJob, size: int, out: np.ndarray) -> tuple[np.ndarray, SlideError | None, float]:
    started = time.perf_counter()
    try:
        _, valid = job.slide.read_tiles(job.xy, size, job.extent, out)
    except SlideError as error:
        return np.zeros(len(job.xy), bool), error, time.perf_counter() - started
    return valid, None, time.perf_counter() - started


def _batch(tiles: np.ndarray, jobs: list[TileJob], parts: Sequence[Future]) -> TileBatch:
    """The batch when all its parts are read; raises what a thread raised."""
    results = [part.result() for part in parts]
    errors = {place: error for place, (_, error, _) in enumerate(results) if error is not None}
    valid = np.concatenate([valid for valid, _, _ in results])
    return TileBatch(tiles, valid, jobs, errors, sum(seconds for _, _, seconds in results))
