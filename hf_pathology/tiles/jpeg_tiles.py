"""Tiles as JPEG streams: the one that the slide stores where a tile is exactly a stored tile, else one of its pixels."""

from dataclasses import dataclass

import numpy as np
import simplejpeg

from ..slides.reader import Slide
from ..slides.stored import Checksums, StoredLevel


# Whole colour resolution: slides store colour at half of it already, and stains are told apart by colour alone.
COLOUR_RESOLUTION = "444"


@dataclass(frozen=True)
class JpegTile:
    """A tile as a JPEG stream.

    Attributes:
        stream: whole, with its tables and the marker that says what its colours are.
        passed: whether it is the scanner's own, never decoded and encoded again.
    """

    stream: bytes
    passed: bool


def jpeg_tiles(
    slide: Slide,
    xy: np.ndarray,
    size: int,
    extent: tuple[float, float],
    *,
    quality: int,
    verify: bool = True,
    checksums: Checksums | None = None,
) -> list[JpegTile | None]:
    """The tiles at the corners `xy` (N, 2) as JPEG streams; None for each one that cannot be read.

    Args:
        size: edge of a tile in output pixels.
        extent: edge (x, y) of a tile in level-0 pixels.
        quality: 1 to 100, of the tiles that have to be encoded.
        verify: decode also the streams that are passed on, so that none is damaged; else only their headers are read.
        checksums: of the stored tiles, when the slide was looked at before; a stream that has changed since is no tile.
    """
    tiles: list[JpegTile | None] = [None] * len(xy)
    level = slide.level_for((extent[0] / size, extent[1] / size))
    numbers = stored_numbers(slide, xy, size, extent)
    looked_at = checksums if checksums is not None and checksums.level == level.number else None
    for row in np.flatnonzero(numbers >= 0):
        tiles[row] = _passed_on(level.stored, slide.file, int(numbers[row]), size, verify, looked_at)
    others = np.flatnonzero(numbers < 0)
    if len(others):
        pixels, valid = slide.read_tiles(xy[others], size, extent)
        for row, tile, good in zip(others, pixels, valid):
            if good:
                encoded = simplejpeg.encode_jpeg(tile, quality, "RGB", COLOUR_RESOLUTION)
                tiles[row] = JpegTile(encoded, passed=False)
    return tiles


def stored_numbers(slide: Slide, xy: np.ndarray, size: int, extent: tuple[float, float]) -> np.ndarray:
    """For each tile the number of the stored tile that it is pixel for pixel, int64 (N,); -1 where it is none."""
    numbers = np.full(len(xy), -1, np.int64)
    level = slide.level_for((extent[0] / size, extent[1] / size))
    stored = level.stored
    source = tuple(round(edge / scale) for edge, scale in zip(extent, level.downsample))
    if stored is None or stored.shrink > 1 or slide.icc or not stored.tile == source == (size, size):
        return numbers
    corners = np.rint(xy / level.downsample).astype(np.int64)  # as they are rounded when pixels are read
    cells, beside = np.divmod(corners, size)
    whole = ((beside == 0) & (corners >= 0) & (corners + size <= level.size)).all(axis=1)
    numbers[whole] = cells[whole, 1] * stored.columns + cells[whole, 0]
    return numbers


def declares(stream: bytes, size: int) -> bool:
    """Whether the header of a JPEG stream says that its picture is `size` x `size`; nothing is decoded."""
    try:
        return simplejpeg.decode_jpeg_header(stream)[:2] == (size, size)
    except ValueError:
        return False


def decode_tile(stream: bytes, size: int) -> np.ndarray | None:
    """The pixels of a JPEG stream, uint8 (size, size, 3), or None when it is damaged or declares another size."""
    try:
        return simplejpeg.decode_jpeg(stream, "RGB") if declares(stream, size) else None
    except ValueError:
        return None


def _passed_on(
    stored: StoredLevel, file: int, number: int, size: int, verify: bool, checksums: Checksums | None
) -> JpegTile | None:
    try:
        stream = stored.stream(file, number, checksums)
    except ValueError:
        return None
    whole = decode_tile(stream, size) is not None if verify else declares(stream, size)
    return JpegTile(stream, passed=True) if whole else None
