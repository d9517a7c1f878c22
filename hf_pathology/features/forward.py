"""Batches of tiles through an encoder; on a GPU, copying, the forward pass and reading go on at the same time."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..tiles.batches import TileBatch
from .encoder import Encoder
from .timing import Timing


class TileEncoder(Protocol):
    """Whatever makes features (B, D), float32 on the CPU, of uint8 tiles (B, h, w, 3), and says what it is."""

    name: str
    revision: str
    pooling: str

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class EncodedBatch:
    """The features float32 (B, D) of a batch, and what it took. The tiles of the batch are gone by now."""

    batch: TileBatch
    features: np.ndarray
    timing: Timing


def encode_batches(batches: Iterable[TileBatch], encoder: TileEncoder) -> Iterator[EncodedBatch]:
    """The features of all batches in their order."""
    if isinstance(encoder, Encoder) and encoder.device.type == "cuda":
        return _overlapped(batches, encoder)
    return _one_by_one(batches, encoder)


def _one_by_one(batches: Iterable[TileBatch], encoder: TileEncoder) -> Iterator[EncodedBatch]:
    for batch, wait in _timed(batches):
        began = time.perf_counter()
        features = encoder(torch.from_numpy(batch.tiles)).numpy()
        yield EncodedBatch(batch, features, Timing(wait=wait, forward=time.perf_counter() - began))


def _overlapped(batches: Iterable[TileBatch], encoder: Encoder) -> Iterator[EncodedBatch]:
    """Each batch is copied while the one before it is encoded, and its features are fetched after the next was begun."""
    copying, encoding = torch.cuda.Stream(encoder.device), torch.cuda.current_stream(encoder.device)
    fetch_previous: Callable[[], EncodedBatch] | None = None
    for batch, wait in _timed(batches):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        with torch.cuda.stream(copying):
            marks[0].record()
            tiles = torch.from_numpy(batch.tiles).to(encoder.device, non_blocking=True)
            marks[1].record()
        encoding.wait_stream(copying)
        tiles.record_stream(encoding)
        marks[2].record(encoding)
        on_device = encoder.features(tiles)
        features = torch.empty(on_device.shape, pin_memory=True)
        features.copy_(on_device, non_blocking=True)
        marks[3].record(encoding)
        marks[1].synchronize()  # from here on the buffer of the batch may be written over
        if fetch_previous is not None:
            yield fetch_previous()
        fetch_previous = _fetcher(batch, features, marks, wait)
    if fetch_previous is not None:
        yield fetch_previous()


def _fetcher(
    batch: TileBatch, features: torch.Tensor, marks: list[torch.cuda.Event], wait: float
) -> Callable[[], EncodedBatch]:
    """A function that waits for the features of a batch: `marks` stand before and after its copy and its encoding."""

    def fetch() -> EncodedBatch:
        marks[3].synchronize()
        transfer, forward = (marks[i].elapsed_time(marks[i + 1]) / 1000 for i in (0, 2))
        return EncodedBatch(batch, features.numpy(), Timing(wait=wait, transfer=transfer, forward=forward))

    return fetch


def _timed(batches: Iterable[TileBatch]) -> Iterator[tuple[TileBatch, float]]:
    """The batches, each with the seconds that it was waited for."""
    iterator = iter(batches)
    began = time.perf_counter()
    while (batch := next(iterator, None)) is not None:
        yield batch, time.perf_counter() - began
        began = time.perf_counter()
