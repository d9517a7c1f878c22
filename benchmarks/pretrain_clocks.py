"""How the ways of pretraining are timed: options, tiles, clocks that take turns, a table."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from pretrain_ways import Setup, Way, ways
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from hf_pathology.recipes.inputs import views_to_inputs
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.tiles.folder import read_tile
from hf_pathology.tiles.folder_blocks import find_images


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """How to measure; see `--help`."""

    device: torch.device
    precisions: list[str]
    plain_precisions: list[str]
    rounds: int
    steps: int
    workers: int
    peak: float | None = None
    profile: bool = False

    def ways(self, setup: Setup) -> list[Way]:
        return ways(setup, self.precisions, self.plain_precisions, self.device)

    def clock(self) -> float:
        """Seconds of processor time, with a GPU those that pass."""
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()


# Tiles.


def draw_tiles(folder: Path, size: int, count: int = 128) -> None:
    """Writes JPEGs of drawn tissue, as many as there is room for, up to `count`."""
    edge = math.ceil((3 * count) ** 0.5)  # tiles along the slide, of which two fifths are tissue
    slide, tissue = draw_slide(0, "glandular", edge * size)
    covered = cv2.resize(tissue.mask.astype(np.float32), (edge, edge), interpolation=cv2.INTER_AREA) > 0.5
    for number, (top, left) in enumerate(np.argwhere(covered)[:count] * size):
        Image.fromarray(slide[top : top + size, left : left + size]).save(folder / f"{number:04d}.jpg", quality=90)


def read_rows(folder: Path, setup: Setup, count: int) -> list[dict[str, Any]]:
    """The first `count` tiles, over again where there are fewer, as the stream hands them to `MultiCrop`."""
    size = (setup.tile_size, setup.tile_size)
    tiles = [read_tile(folder / path) for path in find_images(folder)[:count]]
    tiles = [cv2.resize(tile, size, interpolation=cv2.INTER_AREA) for tile in tiles]
    places = [{"slide": "tiles", "xy": np.array([number, 0]), "epoch": 0} for number in range(count)]
    return [{"tile": tiles[number % len(tiles)], **place} for number, place in enumerate(places)]


def make_inputs(setup: Setup, rows: list[dict[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of views of all rows, on the device."""
    make = setup.multi_crop()
    return views_to_inputs(setup.views, device)(default_collate([make(row) for row in rows]))


# Clocks.


def seconds_of(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds of one `run`, of `times` in a row: by events of a GPU, or of processor time."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(times):
            run()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1000 / times
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def in_turn(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each says in each round; they take turns at being first, and a round before the first is not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            value = runs[name]()
            if turn:
                found[name].append(value)
    return found


def times(slow: list[float], fast: list[float]) -> str:
    """How many times less `fast` takes: the median of the rounds, the least and the most."""
    ratios = sorted(one / other for one, other in zip(slow, fast))
    return f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def peak_flops(precision: str, options: Options) -> float:
    """FLOP/s of one large matrix product, the best of several."""
    if options.peak:
        return options.peak * 1e12
    edge = 8192 if options.device.type == "cuda" else 2048
    left, right = (torch.randn(edge, edge, device=options.device).to(DTYPES[precision]) for _ in range(2))
    return 2 * edge**3 / min(seconds_of(lambda: left @ right, 2, options.device) for _ in range(6))


def counted_flops(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(list(columns)))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(end="", flush=True)
