"""Does a large cohort cost more than a small one: time to the first batch, memory, open files, seconds a tile.

    python benchmarks/scale.py FOLDER [--slides 100 1000 10000]

Makes cohorts of hard links to a few drawn slides in FOLDER and tiles the originals; the links get copies of their grids,
which are found again as those of any tiled cohort are. Then streams from each cohort in a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

from slides import cohort as write_cohort

from hf_pathology.slides.cohort import find_slides
from hf_pathology.slides.tiling import GridOptions, grid_path, mask_path, overview_path, tile_cohort, tile_slide
from hf_pathology.tiles.blocks import SlideBlocks
from hf_pathology.tiles.loader import TileLoader


OPTIONS = GridOptions(mpp=0.25, tile_size=64, stride=32)  # some hundred tiles of each small slide
BATCHES = 50
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slides", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream is not None:
        print(json.dumps(stream(options.stream)))
        return
    print("| slides | tiles | first batch, s | then ms a tile | memory, MB | open files |")
    print("|---|---|---|---|---|---|")
    for count in options.slides:
        folder = options.folder / str(count)
        if not (folder / "ready").exists():
            prepare(folder, count)
        command = [sys.executable, __file__, str(options.folder), "--stream", str(folder)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"| {count:,} | {found['tiles']:,} | {found['first']:.2f} | {found['ms']:.3f} "
            f"| {found['memory']:.0f} | {found['files']} |"
        )


def prepare(folder: Path, count: int) -> None:
    """A tiled cohort of `count` slides in `folder`."""
    write_cohort(folder / "slides", count)
    original = {}
    for slide in find_slides(folder / "slides"):
        inode = slide.path.stat().st_ino
        if inode not in original:
            original[inode] = (slide.key, tile_slide(slide, folder / "tiles", OPTIONS))
            continue
        key, grid = original[inode]
        replace(grid, slide=slide.key).save(grid_path(folder / "tiles", slide.key))
        for path_of in (mask_path, overview_path):
            link = path_of(folder / "tiles", slide.key)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path_of(folder / "tiles", key), link)
    (folder / "ready").touch()


def stream(folder: Path) -> dict[str, float]:
    """What the first batch and the following ones of the cohort in `folder` cost."""
    before, started = memory(), time.perf_counter()
    found = list(tile_cohort(find_slides(folder / "slides"), folder / "tiles", OPTIONS))
    grids, paths = [grid for _, grid in found], [slide.path for slide, _ in found]
    source = SlideBlocks(grids, paths, 4)
    loader = TileLoader(source, lambda row: {"pixels": row["tile"]}, batch_size=BATCH, window=64, workers=0)
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in islice(batches, BATCHES):
        pass
    seconds = time.perf_counter() - started
    return {
        "tiles": sum(map(len, grids)),
        "first": first,
        "ms": seconds / BATCHES / BATCH * 1e3,
        "memory": memory() - before,
        "files": len(os.listdir("/proc/self/fd")),
    }


def memory() -> float:
    """The most memory this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
