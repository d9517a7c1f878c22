"""How fast are tiles read? This reader, the usual ways, and the limit that decoding sets, in turn on the same cores.

    python benchmarks/slides.py SLIDES
    python benchmarks/reading.py SLIDES
    python benchmarks/reading.py SLIDES --dialects aperio-256-420 --cases half --seconds 3 --markdown reading.md
    python benchmarks/reading.py SLIDES --dialects --slide slide.dcm

Prints a table for each slide and case. All ways are run one after the other in each of several rounds, each time in
another order, pinned to as many cores as the table says, with the file in the page cache. The clock starts when a way has
made its first tiles. A table has the median over the rounds of the tiles a second, of the milliseconds of processor time
that a tile took in all processes, and of the ratios, within a round, to OpenSlide and Pillow on one core and to the bare
decoding of stored tiles on as many cores. Without `hf_pathology/tiles/batches.py` only the other ways are measured.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import openslide
import plain_ways
import psutil
import torch
from plain_ways import Work
from slides import DIALECTS, slide_path


BLOCK = 10  # by 10 neighbouring tiles are read together, and are a batch
PLAIN = "OpenSlide + Pillow"
BARE = {1: "bare decoding", 2: "bare decoding, 2 threads"}
PSNR_TILES = 256


@dataclass(frozen=True)
class Case:
    """What is asked of a slide: edge to edge tiles from `start`, `downsample` times coarser than level 0."""

    title: str
    size: int
    downsample: int = 1
    start: tuple[int, int] = (0, 0)
    shuffled: bool = False


CASES = {
    "aligned": Case("256 px, native, from (0, 0), row by row", 256),
    "aligned-shuffled": Case("256 px, native, from (0, 0), shuffled", 256, shuffled=True),
    "unaligned-shuffled": Case("224 px, native, from (37, 53), shuffled", 224, start=(37, 53), shuffled=True),
    "half": Case("256 px at half the resolution (512 px of level 0), row by row", 256, downsample=2),
}


@dataclass(frozen=True)
class Way:
    """A way to read: `read(work)` yields how many tiles it has just made, for ever, on `cores` cores."""

    name: str
    read: Callable[[Work], Iterator[float]]
    cores: int = 1


@dataclass(frozen=True)
class Run:
    """What one way did in one round."""

    tiles_per_s: float
    cpu_ms_per_tile: float


def ways_for(path: Path, case: Case) -> list[Way]:
    """The ways that can read this slide, the plain one first."""
    ways = [
        Way(PLAIN, plain_ways.openslide_pillow),
        Way("OpenSlide, raw BGRA", plain_ways.openslide_raw),
        Way("as CLAM, float32 items", plain_ways.clam_items),
        Way("as TRIDENT, uint8 items", plain_ways.trident_items),
        Way("as CLAM, DataLoader of 2 workers", plain_ways.clam_loader, 2),
        Way("as TRIDENT, DataLoader of 2 workers", plain_ways.trident_loader, 2),
    ]
    if plain_ways.is_tiff(path):
        ways += [Way(name, partial(plain_ways.bare_decode, threads=cores), cores) for cores, name in BARE.items()]
    if find_spec("hf_pathology.tiles.batches") is None:
        return ways
    for half_scale in (False, True) if case.downsample > 1 else (False,):
        name = "ours, half-scale decoding" if half_scale else "ours"
        ways.append(Way(f"{name}, read_tiles", partial(our_read_tiles, half_scale=half_scale)))
        ways.append(Way(f"{name}, 1 thread", partial(our_batches, half_scale=half_scale)))
        ways.append(Way(f"{name}, 2 threads", partial(our_batches, threads=2, half_scale=half_scale), 2))
    return ways


def our_read_tiles(work: Work, half_scale: bool = False) -> Iterator[int]:
    """`Slide.read_tiles`, a block at a time into one buffer, in the calling thread."""
    from hf_pathology.slides.reader import Slide

    buffer = np.empty((BLOCK**2, work.size, work.size, 3), np.uint8)
    with Slide(work.path, half_scale=half_scale) as slide:
        for block in itertools.cycle(work.blocks):
            _, valid = slide.read_tiles(block, work.size, (work.extent, work.extent), buffer[: len(block)])
            yield int(valid.sum())


def our_batches(work: Work, threads: int = 1, half_scale: bool = False) -> Iterator[int]:
    """`read_batches`: threads that read blocks into a ring of batches."""
    from hf_pathology.slides.reader import Slide
    from hf_pathology.tiles.batches import TileJob, read_batches

    with Slide(work.path, half_scale=half_scale) as slide:
        jobs = (TileJob(slide, block, (work.extent, work.extent)) for block in itertools.cycle(work.blocks))
        for batch in read_batches(jobs, work.size, batch_size=BLOCK**2, threads=threads):
            yield int(batch.valid.sum())


def half_scale_psnr(work: Work) -> float:
    """How near half-scale decoding comes to the exact way on some tiles, in dB."""
    from hf_pathology.slides.reader import Slide

    xy = work.xy[np.random.default_rng(0).permutation(len(work.xy))[:PSNR_TILES]]
    with Slide(work.path) as exact, Slide(work.path, half_scale=True) as half:
        pictures = [slide.read_tiles(xy, work.size, (work.extent, work.extent))[0] for slide in (exact, half)]
    error = np.mean([np.square(np.subtract(a, b, dtype=np.float32)).mean() for a, b in zip(*pictures)])
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def work_for(path: Path, case: Case) -> Work:
    """The tiles of a slide that lie wholly in it, in the order of the `case`; whole blocks, where the slide has any."""
    extent = case.size * case.downsample
    with openslide.OpenSlide(path) as slide:
        columns, rows = ((edge - first) // extent for edge, first in zip(slide.dimensions, case.start))
    if min(columns, rows) < 1:
        raise SystemExit(f"{path} has no room for a tile of {extent} px: choose a larger slide, or other --cases")
    columns, rows = (count // BLOCK * BLOCK or count for count in (columns, rows))
    corners = (
        np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1) * extent + case.start
    )  # (rows, columns, 2)
    blocks = [
        corners[row : row + BLOCK, column : column + BLOCK].reshape(-1, 2)
        for row in range(0, rows, BLOCK)
        for column in range(0, columns, BLOCK)
    ]
    xy = corners.reshape(-1, 2)
    if case.shuffled:
        rng = np.random.default_rng(0)
        xy, blocks = rng.permutation(xy), [blocks[i] for i in rng.permutation(len(blocks))]
    return Work(path, xy, blocks, case.size, extent)


def compare(ways: list[Way], work: Work, cores: list[int], seconds: float, rounds: int) -> dict[str, list[Run]]:
    """The runs of each way, one for each round; the way that begins a round ends the next one."""
    runs: dict[str, list[Run]] = {way.name: [] for way in ways}
    with open(work.path, "rb") as file:
        while file.read(1 << 24):  # into the page cache
            pass
    for turn in range(rounds):
        first = turn % len(ways)
        for way in ways[first:] + ways[:first]:
            runs[way.name].append(run(way, work, cores, seconds))
    return runs


def run(way: Way, work: Work, cores: list[int], seconds: float) -> Run:
    """What `way` does in some `seconds` on the first of the `cores`."""
    os.sched_setaffinity(0, cores[: way.cores])  # its threads and processes inherit it
    reading = way.read(work)
    next(reading)
    tiles, elapsed, started, spent = 0.0, 0.0, time.perf_counter(), cpu_seconds()
    while elapsed < seconds:
        tiles += next(reading)
        elapsed = time.perf_counter() - started
    spent = cpu_seconds() - spent
    reading.close()
    return Run(tiles / elapsed, 1000 * spent / tiles)


def cpu_seconds() -> float:
    """Processor time of this process and of its living children; `getrusage` counts children only when they have ended."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in children)


def table(ways: list[Way], runs: dict[str, list[Run]]) -> str:
    """The runs as a markdown table, a row for each way."""
    lines = ["| way | cores | tiles/s | CPU ms/tile | × plain | × bare |", "|---|---|---|---|---|---|"]
    for way in ways:
        speed = median(one.tiles_per_s for one in runs[way.name])
        cpu = median(one.cpu_ms_per_tile for one in runs[way.name])
        plain = ratio(runs[way.name], runs[PLAIN])
        bare = ratio(runs[way.name], runs.get(BARE[way.cores]))
        lines.append(f"| {way.name} | {way.cores} | {speed:,.0f} | {cpu:.3f} | {plain} | {bare} |")
    return "\n".join(lines)


def ratio(runs: list[Run], others: list[Run] | None) -> str:
    """The median over the rounds of how many times faster the `runs` were than the `others`."""
    if others is None:
        return "–"
    return f"{median(one.tiles_per_s / other.tiles_per_s for one, other in zip(runs, others)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the slides of slides.py")
    parser.add_argument("--dialects", nargs="*", choices=DIALECTS, default=list(DIALECTS), metavar="NAME")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES)
    )
    parser.add_argument("--slide", type=Path, nargs="+", default=[], help="further slides, of any format")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a way runs in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path, help="a file that gets the tables, too")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed for the rows of two cores, and this process may use one only")
    texts = []
    for path in [slide_path(options.folder, name) for name in options.dialects] + options.slide:
        for case in map(CASES.get, options.cases):
            work, ways = work_for(path, case), ways_for(path, case)
            runs = compare(ways, work, cores, options.seconds, options.rounds)
            texts.append(f"### {path.name}: {case.title}\n\n{table(ways, runs)}\n")
            if any(way.name.startswith("ours, half-scale") for way in ways):
                texts[-1] += (
                    f"\nHalf-scale decoding differs from the exact way by {half_scale_psnr(work):.1f} dB (PSNR).\n"
                )
            print(texts[-1], flush=True)
            if options.markdown:
                options.markdown.write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
