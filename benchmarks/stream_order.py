"""How block and window decide what a stream costs and how well it mixes: decoding, slides in a batch, memory.

    python benchmarks/slides.py SLIDES --only aperio-256-420
    python benchmarks/stream_order.py SLIDES/aperio-256-420.svs

Speed is that of reading blocks of the slide in random order at 224 px, native resolution, not aligned with the stored tiles,
on one core. Mixing is counted on the order that a training run would see of a cohort of 1,000 slides with 200 to 20,000 tiles
each (the number is log-uniform; the lattice is a square): how many different slides are in 512 consecutive tiles (median),
the share of the tiles that have a tile of the same block within the 256 that follow, and the same two of a perfect shuffle.
Memory is that of the tiles of one window.
"""

import sys
import time
from statistics import median

import cv2
import numpy as np

from hf_pathology.slides.grid import TileGrid, tile_grid
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.tissue import Tissue
from hf_pathology.tiles.blocks import SlideBlocks, blocks_of
from hf_pathology.tiles.stream import BlockOrder


SIZE, TILES, BATCH, SECONDS = 224, 512, 256, 2.0
SLIDES = 1000
TOTAL = 60_000  # tiles of the order that are looked at


def main(path: str) -> None:
    speeds = {block: tiles_per_second(path, block) for block in (1, 2, 3, 4, 6, 8)}
    grids = drawn_grids()
    print("| block | tiles/s | window | tiles | MB | slides in 512 tiles | neighbours in a batch |")
    print("|---|---|---|---|---|---|---|")
    for block, speed in speeds.items():
        owners, sizes = blocks_with_owner(grids, block)
        for window in (16, 32, 64, 128):
            slides, places = consecutive_tiles(owners, sizes, window)
            tiles = window * sizes.mean()
            print(
                f"| {block} x {block} | {speed:,.0f} | {window} | {tiles:,.0f} | {tiles * SIZE**2 * 3 / 1e6:,.0f} "
                f"| {diversity(slides):.0f} | {neighbours(places):.0%} |"
            )
    tiles = np.repeat(np.arange(len(grids)), [len(grid) for grid in grids])
    shuffled = np.random.default_rng(0).choice(tiles, TOTAL, replace=False)
    print(f"| perfect shuffle | | | | | {diversity(shuffled):.0f} | 0% |")


def tiles_per_second(path: str, block: int) -> float:
    """How fast the blocks of a slide are read in random order."""
    cv2.setNumThreads(1)
    with Slide(path) as slide:
        everywhere = Tissue(np.ones((1, 1), bool), tuple(map(float, slide.dimensions)))
        grid = tile_grid(slide, everywhere, key="slide", size=SIZE, mpp=slide.mpp[0], mpp_tolerance=0)
    source = SlideBlocks([grid], [path], block)
    order = np.random.default_rng(0).permutation(len(source))
    source.read(order[:1])
    rates, place = [], 1
    for _ in range(5):
        started, done = time.process_time(), 0
        while time.process_time() - started < SECONDS / 5:
            done += len(source.read([order[place % len(order)]]).tiles)
            place += 1
        rates.append(done / (time.process_time() - started))
    return median(rates)


def drawn_grids() -> list[TileGrid]:
    """The grids of a cohort of slides of very different size."""
    rng = np.random.default_rng(0)
    grids = []
    for number in range(SLIDES):
        edge = int(np.sqrt(np.exp(rng.uniform(np.log(200), np.log(20_000)))))
        xy = np.stack(np.meshgrid(np.arange(edge), np.arange(edge)), axis=-1).reshape(-1, 2) * SIZE
        whole = (float(SIZE), float(SIZE))
        grids.append(
            TileGrid(str(number), SIZE, 0.5, (0.5, 0.5), whole, whole, (edge * SIZE,) * 2, xy, np.ones(len(xy)))
        )
    return grids


def blocks_with_owner(grids: list[TileGrid], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every block of the cohort its slide and how many tiles it has."""
    sizes = [[len(rows) for rows in blocks_of(grid, block)] for grid in grids]
    return np.repeat(np.arange(len(grids)), [len(each) for each in sizes]), np.concatenate(sizes)


def consecutive_tiles(owners: np.ndarray, sizes: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The slide and the block of each tile in the order of one reader."""
    order = BlockOrder(len(owners), None, seed=0).of_epoch(0)
    places: list[np.ndarray] = []
    for number in range(len(order) // window):
        blocks = order[number * window : (number + 1) * window]
        tiles = np.repeat(blocks, sizes[blocks])
        places.append(tiles[np.random.default_rng((0, 0, number)).permutation(len(tiles))])
        if sum(map(len, places)) > TOTAL:
            break
    blocks = np.concatenate(places)
    return owners[blocks], blocks


def diversity(slides: np.ndarray) -> float:
    """The median number of different slides in `TILES` consecutive tiles."""
    return median(len(np.unique(slides[start : start + TILES])) for start in range(0, len(slides) - TILES, TILES // 4))


def neighbours(blocks: np.ndarray) -> float:
    """The share of tiles that have one of their own block among the `BATCH` that follow."""
    seen: dict[int, int] = {}
    close = 0
    for place, block in enumerate(blocks.tolist()[::-1]):
        close += place - seen.get(block, -(10**9)) <= BATCH
        seen[block] = place
    return close / len(blocks)


if __name__ == "__main__":
    main(sys.argv[1])
