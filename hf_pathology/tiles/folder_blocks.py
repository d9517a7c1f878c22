"""Blocks of tiles out of a folder of images, as public tile sets come: for pretraining without slides and without shards."""

import hashlib
import os
import struct
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError, require_at_least
from ..slides.cohort import read_table
from .blocks import TileRows
from .filters import TileFilter
from .folder import SUFFIXES, read_tile
from .jpeg_tiles import decode_tile


JPEG = (".jpg", ".jpeg")
EIGHT_BIT = ("RGB", "RGBA", "L", "P")  # Pillow's modes that `read_tile` reads
LOOKING = 16  # images that are looked at together, because a network file system takes its time for each
MAX_TILE_EDGE = 4096  # pixels
MEMORY_SHARE = 0.5  # of the machine's memory that decoded tiles may take


class FolderBlocks:
    """The images of a folder, dealt into blocks, and decoded when they are asked for, or all at once.

    Args:
        folder: with images at any depth, or with a `manifest.csv` that names them in its column `path`.
        splits: only the images of these splits, by the manifest's column `split`; all when None.
        block: images in a block.
        mpp: microns per pixel of the images; None says that it is not known.
        in_memory: decode every image once, and keep its pixels. Worker processes that are forked share them; others
            decode for themselves.
        tile_filter: which tiles are good enough, judged by their pixels.

    Attributes:
        paths: of the images, relative to `folder`, with "/".
        size: edge of the images in pixels.
        tiles: how many there are that can be read, as far as it is known without decoding them.
        problems: one message for each of the others.

    A `TileSource`, as `SlideBlocks` is. Raises UserError when there is no image, a manifest that does not fit, and when
    images are not square or differ in size.
    """

    weights = None

    def __init__(
        self,
        folder: str | Path,
        *,
        splits: Sequence[str] | None = None,
        block: int = 32,
        mpp: float | None = None,
        in_memory: bool = False,
        tile_filter: TileFilter | None = None,
    ):
        require_at_least(1, block=block)
        self.folder, self.mpp, self.in_memory, self.tile_filter = Path(folder), mpp, in_memory, tile_filter
        self.paths = find_images(self.folder, splits)
        self._blocks = -(-len(self.paths) // block)
        facts = _in_threads(self._look_at, self.paths, LOOKING)
        self.size = self._one_size([edges for edges, _ in facts])
        self._bytes = [count for _, count in facts]
        self._unreadable = {i for i, (edges, _) in enumerate(facts) if edges is None}
        self._pixels: np.ndarray | None = None  # (N, size, size, 3)
        if in_memory:
            self._decode_all()

    def __len__(self) -> int:
        return self._blocks

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None}

    @property
    def tiles(self) -> int:
        return len(self.paths) - len(self._unreadable)

    @property
    def problems(self) -> list[str]:
        return [f"{self.folder / self.paths[i]} cannot be read as an 8-bit image" for i in sorted(self._unreadable)]

    @property
    def fingerprint(self) -> str:
        """A hash of the images' paths and sizes in bytes: runs with the same one see the same tiles."""
        return hashlib.blake2b(repr((self.paths, self._bytes)).encode(), digest_size=8).hexdigest()

    def read(self, numbers: Sequence[int]) -> TileRows:
        """The tiles of these blocks; None for one whose image is damaged, or which the filter drops.

        Neighbours in a folder are often alike, and nothing is gained by reading them together: block b of B holds the
        images b, b + B, b + 2 B and so on.
        """
        if self.in_memory and self._pixels is None:
            self._decode_all()
        members = [i for number in sorted(numbers) for i in range(number, len(self.paths), self._blocks)]
        return TileRows(
            [self._tile(i) for i in members], [self.paths[i] for i in members], np.zeros((len(members), 2), np.int64)
        )

    def _tile(self, i: int) -> np.ndarray | None:
        tile = self._decode(i) if self._pixels is None else self._pixels[i]
        return None if i in self._unreadable or (self.tile_filter and not self.tile_filter(tile)) else tile

    def _decode(self, i: int) -> np.ndarray | None:
        """The pixels of an image, or None when it is damaged, which is said the first time."""
        if i in self._unreadable:
            return None
        path = self.folder / self.paths[i]
        try:
            tile = decode_tile(path.read_bytes(), self.size) if path.suffix.lower() in JPEG else None  # twice as fast
            tile = read_tile(path) if tile is None else tile
            if tile.shape == (self.size, self.size, 3):
                return tile
            error = f"{path} has {tile.shape[1]} x {tile.shape[0]} px and had {self.size}: it was changed meanwhile"
        except (UserError, OSError) as unreadable:
            error = str(unreadable)
        print(f"left out: {error}", file=sys.stderr, flush=True)
        self._unreadable.add(i)
        return None

    def _decode_all(self) -> None:
        """Fills `_pixels`. Raises UserError when they would take too much of the memory."""
        needed = len(self.paths) * self.size**2 * 3
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > MEMORY_SHARE * memory:
            raise UserError(
                f"{self.folder} takes {needed / 1e9:,.1f} GB when it is decoded, and the machine has {memory / 1e9:,.1f}: "
                "do not keep it in memory"
            )
        pixels = np.zeros((len(self.paths), self.size, self.size, 3), np.uint8)

        def fill(i: int) -> None:
            tile = self._decode(i)
            if tile is not None:
                pixels[i] = tile

        _in_threads(fill, range(len(self.paths)), os.cpu_count() or 1)
        self._pixels = pixels

    def _look_at(self, path: str) -> tuple[tuple[int, int] | None, int]:
        """Width and height that an image's header states, None when it is no 8-bit image, and the file's size in bytes."""
        edges, count = None, 0
        try:
            count = (self.folder / path).stat().st_size
            with Image.open(self.folder / path) as image:
                edges = image.size if image.mode in EIGHT_BIT else None
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError):
            pass  # counted among the problems
        return edges, count

    def _one_size(self, found: list[tuple[int, int] | None]) -> int:
        """The edge of all images."""
        known = [(edges, path) for edges, path in zip(found, self.paths) if edges is not None]
        if not known:
            raise UserError(f"{self.folder}: none of its {len(self.paths)} images can be read; first: {self.paths[0]}")
        (width, height), first = known[0]
        for (wide, high), path in known:
            if (wide, high) != (width, height):
                raise UserError(
                    f"{self.folder / path} has {wide} x {high} px and {first} has {width} x {height}: "
                    "all images must have one size; cut or resize the others"
                )
        if width != height or width > MAX_TILE_EDGE:
            raise UserError(
                f"{self.folder / first} has {width} x {height} px: tiles are square, of up to {MAX_TILE_EDGE} px; "
                "cut the images into tiles"
            )
        return width


def find_images(folder: str | Path, splits: Sequence[str] | None = None) -> list[str]:
    """The paths of the images in `folder`, relative to it: in the order of its `manifest.csv`, or all of them, sorted.

    Args:
        splits: only the images of these splits, by the manifest's column `split`; all when None.

    Raises UserError when there is none, when the manifest names a file that is missing, and for splits without a manifest.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: pass a folder of tiles")
    table = folder / "manifest.csv"
    if not table.is_file():
        if splits is not None:
            raise UserError(
                f"{folder} has no manifest.csv, which would say what its splits are: pass a folder of each"
            )
        paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
        found = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
        if not found:
            raise UserError(f"{folder} holds no image: expected {', '.join(SUFFIXES)} files at any depth")
        return found
    rows = read_table(table, required=("path",) if splits is None else ("path", "split"))
    for path in rows["path"]:
        if not (folder / path).is_file():
            raise UserError(f"{table} names {path}, which is not in {folder}: mend the table or add the file")
    if splits is not None:
        unknown = sorted(set(splits) - set(rows["split"]))
        if unknown:
            raise UserError(
                f"{table} has no split {', '.join(unknown)}: it has {', '.join(sorted(set(rows['split'])))}"
            )
        rows = rows[rows["split"].isin(list(splits))]
    if rows.empty:
        raise UserError(f"{table} names no image: list the tiles in its column path")
    return rows["path"].to_list()


def _in_threads(do: Callable[[Any], Any], items: Sequence[Any], threads: int) -> list[Any]:
    """What `do` makes of each item; each thread takes a run of them, for handing them out one by one costs more."""
    run = -(-len(items) // threads)
    with ThreadPoolExecutor(threads) as pool:
        runs = pool.map(lambda start: [do(item) for item in items[start : start + run]], range(0, len(items), run))
        return [result for each in runs for result in each]
