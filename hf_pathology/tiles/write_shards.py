"""Shards of a cohort's tiles: files of some hundred megabytes that mix the slides and can be streamed from anywhere.

Blocks of neighbouring tiles are read in a random order over the whole cohort, so that every row group holds tiles of many
slides. Where a shard ends depends on nothing but the shards before it: a run that was killed goes on behind the last shard
that is whole, and its files are those of a run that was not.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import atomic_path
from ..claims import claim, remove_empty
from ..errors import UserError, require_at_least
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from .blocks import KNOWN_SLIDES, OPEN_SLIDES, blocks_of, count_blocks
from .jpeg_tiles import jpeg_tiles
from .shard_files import LocalFiles
from .shard_formats import FORMATS, GROUP_TILES, write_rows
from .shard_manifest import Manifest, Shard
from .stream import BlockOrder
from .tar_shard import tar_index


BLOCK = 2  # edge, in tiles, of what is read together: small, so that a row group mixes many slides
FOLDER = "data"  # where the shards lie in the folder of a dataset


def check_format(format: str, quality: int) -> None:
    """Raises UserError for a format or a JPEG quality that does not exist."""
    if format not in FORMATS:
        raise UserError(f"format is {format}: it must be {' or '.join(FORMATS)}")
    if not 1 <= quality <= 100:
        raise UserError(f"quality is {quality}: it must be between 1 and 100")


def write_shards(
    pairs: Iterable[tuple[CohortSlide, TileGrid]],
    out: str | Path,
    *,
    format: str = "parquet",
    quality: int = 90,
    shard_bytes: int = 500_000_000,
    seed: int = 0,
    keep_order: bool = False,
    verify: bool = True,
    threads: int = 4,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """The shards of all tiles, written to OUT/data with OUT/shards.json, or found there from an earlier run.

    Args:
        pairs: the slides with their grids, all with tiles of one size.
        format: "parquet" or "webdataset".
        quality: of the JPEG of tiles that are no stored tiles; those keep their own (see `jpeg_tiles.py`).
        shard_bytes: of a shard, about.
        seed: of the order.
        keep_order: slide after slide, in the order of `pairs`, instead of mixed.
        verify: decode also the tiles that are passed on as they are stored; a damaged one is left out.
        threads: that read, decode and encode.
        progress: called after each block with the number of its tiles that were written.

    Tiles that cannot be read are left out; `Manifest.load(out)` knows how many of which slide. Raises UserError when OUT
    holds other shards, or another process is writing to it, and SlideError when a slide cannot be opened or has changed.
    """
    require_at_least(1, shard_bytes=shard_bytes, threads=threads)
    check_format(format, quality)
    cohort, out = CohortBlocks(list(pairs), quality, verify), Path(out)
    order = np.arange(len(cohort)) if keep_order else BlockOrder(len(cohort), None, seed).of_epoch(0)
    asked = {"format": format, "size": cohort.size, "quality": quality, "shard_bytes": shard_bytes, "seed": seed}
    asked |= {"keep_order": keep_order, "verify": verify, "tiles": cohort.fingerprint}
    own = claim(out, "shards")
    if own is None:
        raise UserError(f"{out} is being written by another process: wait for it, or choose another --out")
    with own, ThreadPoolExecutor(threads, thread_name_prefix="shards") as pool:
        _clear_partial(out)
        manifest, first = Manifest.begin(out, asked), 0
        while first < len(order):
            number = len(manifest.before(first))
            shard = manifest.found(first)
            if shard is None:
                reading = ShardInReading(
                    cohort, order, first, shard_bytes, pool, None if keep_order else seed, progress
                )
                shard = reading.write(out, f"{FOLDER}/tiles-{number:05d}{FORMATS[format]}")
                manifest.record(shard)
            elif progress is not None:
                for _ in range(first, shard.stop):
                    progress(0)
            if format == "webdataset":
                tar_index(LocalFiles(), str(out / shard.file))  # also for those who stream it from the Hub
            first = shard.stop
    remove_empty(out / ".claims")
    return [out / shard.file for shard in manifest.shards]


@dataclass(frozen=True)
class Rows:
    """The tiles of one or more blocks as rows of a shard, with what could not be read.

    Attributes:
        rows: dicts of `FEATURES`, the image as its JPEG stream.
        passed: how many of them are streams of the scanner.
        unreadable: how many tiles of which slide were left out.
    """

    rows: list[dict[str, Any]]
    passed: int
    unreadable: Counter[str]


class CohortBlocks:
    """The blocks of all slides of a cohort, numbered through, and read as rows of a shard.

    Args:
        pairs: slides and their grids.
        quality, verify: see `jpeg_tiles`.

    Raises UserError when there are no tiles, or tiles of different sizes.
    """

    def __init__(self, pairs: Sequence[tuple[CohortSlide, TileGrid]], quality: int, verify: bool):
        sizes = {grid.size for _, grid in pairs}
        if len(sizes) != 1:
            raise UserError(f"the grids have tiles of {sorted(sizes)} px: make shards of tiles of one size")
        self.pairs, self.quality, self.verify, self.size = pairs, quality, verify, sizes.pop()
        self._ends = np.cumsum([count_blocks(grid, BLOCK) for _, grid in pairs])
        self._slide = lru_cache(OPEN_SLIDES)(lambda index: pairs[index][1].open(pairs[index][0].path))
        self._blocks = lru_cache(KNOWN_SLIDES)(lambda index: blocks_of(pairs[index][1], BLOCK))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the rows: slides as they are on disk, cases, labels, tiles and how they are read."""
        digest = hashlib.sha256()
        for slide, grid in self.pairs:
            stamp = grid.stored or slide.open().layout
            facts = [slide.key, slide.case, slide.label, stamp.file_bytes, stamp.file_time]
            facts += [grid.mpp, grid.slide_mpp, grid.extent, grid.icc, grid.half_scale]
            digest.update(repr(facts).encode() + grid.xy.tobytes() + grid.tissue_fraction.tobytes())
        return digest.hexdigest()

    def read(self, number: int) -> Rows:
        """The tiles of block `number`. Raises SlideError when the slide cannot be opened, or has changed."""
        index = int(np.searchsorted(self._ends, number, side="right"))
        slide, grid = self.pairs[index]
        members = self._blocks(index)[number - self._ends[index]]  # counted from the slide's last block
        same = {"slide": slide.key, "case": slide.case, "label": slide.label}
        same |= {"mpp": float(np.mean(grid.effective_mpp)), "mpp_asked": float(grid.mpp), "size": grid.size}
        xy, opened = np.asarray(grid.xy[members]), self._slide(index)
        options = {"quality": self.quality, "verify": self.verify, "checksums": grid.checksums}
        tiles = jpeg_tiles(opened, xy, grid.size, grid.extent, **options)
        rows = []
        for tile, (x, y), share in zip(tiles, xy.tolist(), grid.tissue_fraction[members].tolist()):
            if tile is not None:
                tissue = None if np.isnan(share) else share  # None: nobody measured it
                rows.append({"image": tile.stream, **same, "x": x, "y": y, "tissue_fraction": tissue})
        passed = sum(tile is not None and tile.passed for tile in tiles)
        return Rows(rows, passed, Counter({slide.key: tiles.count(None)} if None in tiles else {}))


@dataclass
class ShardInReading:
    """A shard from block `first` of the `order` on, as long as it takes to fill it; `seed` mixes the rows of a group."""

    cohort: CohortBlocks
    order: np.ndarray
    first: int
    shard_bytes: int
    pool: ThreadPoolExecutor
    seed: int | None
    progress: Callable[[int], None] | None
    stop: int = 0
    tiles: int = 0
    passed: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)

    def write(self, out: Path, file: str) -> Shard:
        """The shard, written to OUT/FILE, whole or not at all."""
        with atomic_path(out / file) as partial:
            write_rows(partial, Path(file).name, self.groups())
        facts = {name: getattr(self, name) for name in ("first", "stop", "tiles", "passed")}
        return Shard.of_file(out, file, **facts, unreadable=dict(sorted(self.unreadable.items())))

    def groups(self) -> Iterator[list[dict[str, Any]]]:
        """Row group after row group until the shard is full, or nothing is left."""
        together, filled, self.stop = GROUP_TILES // BLOCK**2, 0, self.first
        while self.stop < len(self.order) and filled < self.shard_bytes:
            start, self.stop = self.stop, min(self.stop + together, len(self.order))
            rows: list[dict[str, Any]] = []
            for block in self.pool.map(self.cohort.read, self.order[start : self.stop]):
                rows += block.rows
                self.passed += block.passed
                self.unreadable += block.unreadable
                if self.progress is not None:
                    self.progress(len(block.rows))
            self.tiles += len(rows)
            filled += sum(len(row["image"]) for row in rows)
            if self.seed is not None:
                rows = [rows[i] for i in np.random.default_rng((self.seed, start)).permutation(len(rows))]
            if rows:
                yield rows


def _clear_partial(out: Path) -> None:
    """Removes what a process that was killed left half written."""
    for folder in (out, out / FOLDER):
        for path in folder.glob(".*.partial"):
            path.unlink()
