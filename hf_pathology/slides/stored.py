"""The stored tiles of a slide: where they lie in the file, and how they are decoded without OpenSlide.

Most scanners store a slide as TIFF of JPEG tiles. Decoding those directly, each one once and straight to where its pixels
are needed, is several times faster than asking OpenSlide for each tile that is cut. What has to be known for it is a few
numbers for each level: a `SlideLayout` is found once, is kept with the grid, and a slide is then read without being parsed
again. Metadata always come from OpenSlide, and so do the pixels of every level that is not stored like this.
"""

import base64
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import simplejpeg
import tifffile
from xxhash import xxh3_64_intdigest


DIRECT_VENDORS = ("aperio", "generic-tiff")  # whose levels are plain tiled TIFF, without overlaps or gaps
MAX_STORED_EDGE = 4096  # pixels; a stored tile that claims more is left to OpenSlide
MAX_STORED_BYTES = 64 << 20
TRIED_TILES = 8  # of a level, until one is found that can be decoded


@dataclass(frozen=True)
class StoredLevel:
    """One level whose tiles are JPEG streams in the file.

    Attributes:
        size: width and height of the level in pixels.
        tile: width and height of a stored tile in pixels, multiples of 8.
        offsets, counts: place in the file, and numpy type, of the arrays that say where each stored tile begins and how
            many bytes it has.
        header: what the streams of all tiles lack: tables, and a marker that says whether the colours are YCbCr or RGB.
        shrink: the streams are decoded at 1 / shrink of their size (1, 2, 4 or 8); `size` and `tile` are those after it.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    offsets: tuple[int, str]
    counts: tuple[int, str]
    header: bytes
    shrink: int = 1

    @property
    def columns(self) -> int:
        """How many stored tiles lie side by side."""
        return -(-self.size[0] // self.tile[0])

    @property
    def rows(self) -> int:
        """How many lie one above the other."""
        return -(-self.size[1] // self.tile[1])

    def shrunk(self, shrink: int) -> "StoredLevel":
        """This level as it looks when its tiles are decoded at 1 / `shrink` of their size."""
        size = tuple(-(-edge // shrink) for edge in self.size)
        tile = tuple(edge // shrink for edge in self.tile)
        return StoredLevel(size, tile, self.offsets, self.counts, self.header, shrink)

    def stored_bytes(self, file: int, number: int) -> bytes:
        """What is stored of tile `number` in the open `file`. Raises ValueError when it is not there."""
        offset = _number_at(file, *self.offsets, number)
        count = _number_at(file, *self.counts, number)
        if not 2 < count <= MAX_STORED_BYTES:
            raise ValueError(f"stored tile {number} has {count} bytes")
        stream = os.pread(file, count, offset)
        if len(stream) != count:
            raise ValueError(f"stored tile {number} lies beyond the end of the file")
        return stream

    def stream(self, file: int, number: int, checksums: "Checksums | None" = None) -> bytes:
        """The whole JPEG stream of stored tile `number`. Raises ValueError when it is not there, or has changed."""
        stream = self.stored_bytes(file, number)
        if checksums is not None:
            checksums.check(number, stream)
        return self.header + stream[2:]

    def decode(self, file: int, column: int, row: int, out: np.ndarray, checksums: "Checksums | None" = None) -> None:
        """Decodes a stored tile into `out`, contiguous uint8 (h, w, 3). Raises ValueError when it is damaged."""
        width, height = self.tile
        stream = self.stream(file, row * self.columns + column, checksums)
        if self.shrink == 1:
            pixels = simplejpeg.decode_jpeg(stream, "RGB", buffer=out)  # refuses what is larger than `out`
        else:
            pixels = simplejpeg.decode_jpeg(
                stream, "RGB", min_height=height, min_width=width, min_factor=1, buffer=out
            )
        if pixels.shape != out.shape:
            raise ValueError(f"stored tile {column}, {row} declares {pixels.shape[1]}x{pixels.shape[0]} pixels")

    def decodes(self, file: int, column: int, row: int, out: np.ndarray, checksums: "Checksums | None" = None) -> bool:
        """Decodes a stored tile into `out`, and says whether it could be."""
        try:
            self.decode(file, column, row, out, checksums)
        except ValueError:  # simplejpeg's too, for a stream that is damaged
            return False
        return True


@dataclass(frozen=True)
class Checksums:
    """What the bytes of stored tiles were when they were looked at.

    Attributes:
        level: number of the level in the file.
        numbers: int64 (M,), numbers of stored tiles, ascending.
        values: uint64 (M,), xxh3 of their bytes.
    """

    level: int
    numbers: np.ndarray
    values: np.ndarray

    def check(self, number: int, stream: bytes) -> None:
        """Raises ValueError when the bytes of stored tile `number` are not those that were looked at."""
        place = int(np.searchsorted(self.numbers, number))
        if (
            place < len(self.numbers)
            and self.numbers[place] == number
            and self.values[place] != xxh3_64_intdigest(stream)
        ):
            raise ValueError(f"stored tile {number} has changed since it was looked at")


@dataclass(frozen=True)
class SlideLayout:
    """How the pixels of a slide file are stored; it holds as long as the file is not changed.

    Attributes:
        level_sizes: width and height of each level, level 0 first.
        stored: for each level how to decode it directly, or None when OpenSlide has to read it.
        file_bytes, file_time: size and time of last change (nanoseconds) of the file.
    """

    level_sizes: tuple[tuple[int, int], ...]
    stored: tuple[StoredLevel | None, ...]
    file_bytes: int
    file_time: int

    def matches(self, status: os.stat_result) -> bool:
        """Whether a file with this `status` is still the one that was looked at."""
        return (self.file_bytes, self.file_time) == (status.st_size, status.st_mtime_ns)

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON can hold it, about a kilobyte."""
        fields = asdict(self)
        for level in fields["stored"]:
            if level is not None:
                level["header"] = base64.b64encode(level["header"]).decode()
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "SlideLayout":
        """The layout of what `to_json` made."""
        stored = []
        for level in fields["stored"]:
            if level is not None:
                pairs = {name: tuple(level[name]) for name in ("size", "tile", "offsets", "counts")}
                level = StoredLevel(header=base64.b64decode(level["header"]), shrink=level["shrink"], **pairs)
            stored.append(level)
        return cls(
            tuple(tuple(size) for size in fields["level_sizes"]),
            tuple(stored),
            fields["file_bytes"],
            fields["file_time"],
        )


def find_layout(path: Path, handle: openslide.OpenSlide) -> SlideLayout:
    """How the slide at `path`, open as `handle`, is stored.

    A level is decoded directly only after its richest stored tile was found to have the pixels that OpenSlide reads.
    """
    status = path.stat()
    sizes = handle.level_dimensions
    stored: list[StoredLevel | None] = [None] * len(sizes)
    if handle.properties.get(openslide.PROPERTY_NAME_VENDOR) in DIRECT_VENDORS:
        try:
            with tifffile.TiffFile(path) as tiff, open(path, "rb", buffering=0) as file:
                of_size = {page.shape[1::-1]: page for page in reversed(tiff.pages) if page.is_tiled}
                for number, size in enumerate(sizes):
                    level = _stored_level(of_size[size], tiff.byteorder, status.st_size) if size in of_size else None
                    if level is not None and _equals_openslide(level, file.fileno(), handle, number):
                        stored[number] = level
        except (
            tifffile.TiffFileError,
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            OSError,
            openslide.OpenSlideError,
        ):
            stored = [None] * len(sizes)  # OpenSlide reads such a file, or says what is wrong with it
    return SlideLayout(tuple(sizes), tuple(stored), status.st_size, status.st_mtime_ns)


def _stored_level(page: tifffile.TiffPage, byteorder: str, file_bytes: int) -> StoredLevel | None:
    """The level on `page`, or None when its tiles are not 8-bit JPEG of three colours."""
    tables = page.jpegtables or b"\xff\xd8\xff\xd9"
    jpeg = page.compression == tifffile.COMPRESSION.JPEG and page.dtype == np.uint8
    colours = page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
    whole = page.samplesperpixel == 3 and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
    edges = page.tilewidth, page.tilelength
    if not (jpeg and colours and whole and all(edge % 8 == 0 and 0 < edge <= MAX_STORED_EDGE for edge in edges)):
        return None
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4)  # the marker that libjpeg believes about the colours
    transform = bytes([page.photometric == tifffile.PHOTOMETRIC.YCBCR])
    level = StoredLevel(
        size=(page.imagewidth, page.imagelength),
        tile=edges,
        offsets=_array_place(page.tags["TileOffsets"], byteorder),
        counts=_array_place(page.tags["TileByteCounts"], byteorder),
        header=b"\xff\xd8" + adobe + transform + tables[2:-2],
    )
    complete = page.tags["TileOffsets"].count == page.tags["TileByteCounts"].count == level.columns * level.rows
    return level if complete and 4 * level.columns * level.rows < file_bytes else None


def _array_place(tag: tifffile.TiffTag, byteorder: str) -> tuple[int, str]:
    return tag.valueoffset, np.dtype({3: "u2", 4: "u4", 16: "u8"}[int(tag.dtype)]).newbyteorder(byteorder).str


def _number_at(file: int, place: int, dtype: str, index: int) -> int:
    """Entry `index` of the array of numbers that begins at `place` of the file."""
    width = int(dtype[-1])
    stored = os.pread(file, width, place + index * width)
    if len(stored) != width:
        raise ValueError("the table of stored tiles lies beyond the end of the file")
    return int.from_bytes(stored, "big" if dtype[0] == ">" else "little")


def _equals_openslide(level: StoredLevel, file: int, handle: openslide.OpenSlide, number: int) -> bool:
    """Whether a stored tile looks as OpenSlide reads it, and no tile of the level is missing.

    Compared is the one with the most bytes that is not damaged, bit for bit, but for levels whose downsample is no whole
    number, between whose pixels OpenSlide interpolates.
    """
    place, dtype = level.counts
    counts = np.frombuffer(os.pread(file, level.columns * level.rows * int(dtype[-1]), place), dtype)
    if len(counts) != level.columns * level.rows or counts.min() <= 2:
        return False
    ours = np.empty((level.tile[1], level.tile[0], 3), np.uint8)
    for richest in np.argsort(counts)[::-1][:TRIED_TILES].tolist():
        row, column = divmod(richest, level.columns)
        if level.decodes(file, column, row, ours):
            break
    else:
        return False
    width = min(level.tile[0], level.size[0] - column * level.tile[0])
    height = min(level.tile[1], level.size[1] - row * level.tile[1])
    downsample = handle.level_downsamples[number]
    corner = round(column * level.tile[0] * downsample), round(row * level.tile[1] * downsample)
    read = handle.read_region(corner, number, (width, height))
    difference = np.abs(ours[:height, :width].astype(int) - np.asarray(read)[..., :3])
    return difference.max() == 0 if downsample == int(downsample) else difference.mean() < 8
