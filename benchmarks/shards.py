"""How fast are tiles read from shards, beside the slide that they came from and `datasets` with its `Image` feature?

    python benchmarks/slides.py SLIDES --only aperio-256-420
    python benchmarks/shards.py SLIDES/aperio-256-420.svs
    python benchmarks/shards.py SLIDES/aperio-256-420.svs --size 224 --tiles 2000

Writes shards of the slide's first tiles into a folder for temporary files, says how fast that was, and prints the tiles a
second of each way: the median of several rounds in which all ways run one after the other, on one core, with all files in
the page cache. Every way ends in arrays of uint8. Blocks come in random order, but for `datasets`, which reads one after
the other.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from datasets import disable_progress_bars, load_dataset

from hf_pathology.slides.cohort import CohortSlide
from hf_pathology.slides.grid import TileGrid, tile_grid
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.tissue import Tissue
from hf_pathology.tiles.blocks import SlideBlocks
from hf_pathology.tiles.shard_formats import FORMATS
from hf_pathology.tiles.shard_manifest import Manifest
from hf_pathology.tiles.shards import ShardBlocks
from hf_pathology.tiles.stream import BlockOrder, TileSource
from hf_pathology.tiles.write_shards import write_shards


BLOCKS_AT_ONCE = {"slide": 16, "shards": 1}  # about 64 tiles each


def first_tiles(path: Path, size: int, tiles: int) -> TileGrid:
    """The first tiles of the slide at its own resolution, whatever they show."""
    with Slide(path) as slide:
        everywhere = Tissue(np.ones((1, 1), bool), tuple(map(float, slide.dimensions)))
        return tile_grid(slide, everywhere, key=path.name, size=size, mpp=slide.mpp[0]).select(np.arange(tiles))


def in_random_order(source: TileSource, together: int) -> Iterator[int]:
    """How many tiles each read gave, endlessly."""
    for epoch in range(10**6):
        order = BlockOrder(len(source), None, 0).of_epoch(epoch).tolist()
        for start in range(0, len(order), together):
            yield sum(tile is not None for tile in source.read(order[start : start + together]).tiles)


def by_datasets(folder: Path, format: str) -> Iterator[int]:
    """One tile after the other as `datasets` decodes it."""
    files = sorted(map(str, (folder / "data").glob(f"*{FORMATS[format]}")))
    rows = load_dataset(format, data_files=files, split="train", streaming=True)
    column = {"parquet": "image", "webdataset": "jpg"}[format]
    while True:  # and not itertools.cycle, which would keep the decoded pictures of the first pass
        for row in rows:
            yield int(np.asarray(row[column]).shape[2] == 3)


def tiles_per_second(counts: Iterator[int], seconds: float) -> float:
    """The rate of a way that has made its first tiles."""
    for _ in islice(counts, 2):
        pass
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        done += next(counts)
    return done / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument(
        "--size", type=int, default=256, help="edge of a tile; that of the stored tiles passes them on"
    )
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    disable_progress_bars()
    grid = first_tiles(options.slide, options.size, options.tiles)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for format in FORMATS:
            started = time.perf_counter()
            slide = CohortSlide(options.slide.name, options.slide, "case")
            files = write_shards([(slide, grid)], out / format, format=format, threads=1)
            rate = len(grid) / (time.perf_counter() - started)
            passed, size = Manifest.load(out / format).passed, sum(file.stat().st_size for file in files)
            print(f"{format}: written at {rate:,.0f} tiles/s, {passed} of {len(grid)} passed on, {size / 1e6:.1f} MB")
        ways: dict[str, Callable[[], Iterator[int]]] = {
            "SlideBlocks": lambda: in_random_order(SlideBlocks([grid], [options.slide], 2), BLOCKS_AT_ONCE["slide"])
        }
        for format in FORMATS:
            source = ShardBlocks(out / format)
            ways[f"ShardBlocks, {format}"] = lambda source=source: in_random_order(source, BLOCKS_AT_ONCE["shards"])
            ways[f"datasets, {format}"] = lambda format=format: by_datasets(out / format, format)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                rates[name].append(tiles_per_second(way(), options.seconds))
        print("\n| way | tiles/s |\n|---|---|")
        for name, found in rates.items():
            print(f"| {name} | {median(found):,.0f} |")


if __name__ == "__main__":
    main()
