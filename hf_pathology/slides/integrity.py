"""Whether the stored tiles of a slide are what the scanner wrote: looked at once, and recognised ever after.

JPEG has no checksum. A flipped bit often decodes without any complaint, to other pixels: a shade, or half a tile of rubbish.
What can be done about that is done here. Each stored tile under the tissue is decoded and compared with the coarser level
of the pyramid, which was stored independently of it; and its bytes get a checksum, so that whatever happens to the file
from then on is noticed when the tile is read.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from xxhash import xxh3_64_intdigest

from ..errors import SlideError
from .grid import TileGrid, tissue_fraction
from .reader import Level, Slide
from .stored import Checksums
from .tissue import Tissue


PART = 32  # pixels: edge of the parts of a stored tile whose mean colours are compared
MAX_DIFFERENCE = 16.0  # of 255, between the means of a part on two levels; JPEG and resampling made up to 13 of it
MAX_SUSPECT = 0.01  # share of a slide's tiles
SHRINK = 8  # at an eighth of its size JPEG is decoded several times faster, and the means are the same


@dataclass(frozen=True)
class Integrity:
    """What was found out about the stored tiles that a grid needs.

    Attributes:
        checksums: of all of them.
        suspect: bool (M,), those that cannot be decoded, or that differ from the coarser level.
        compared: whether there was a coarser level.
    """

    checksums: Checksums
    suspect: np.ndarray
    compared: bool


def verified(grid: TileGrid, slide: Slide) -> TileGrid:
    """The grid without the tiles (regions) that need a suspect stored tile, and with the checksums of all others.

    How many were left out is in its `quality`. Raises SlideError when that is more than 1 %. The grid of a slide that is not
    stored as JPEG tiles comes back as it is, but for a note that nothing was compared.
    """
    level = slide.as_stored(slide.level_for((grid.extent[0] / grid.size, grid.extent[1] / grid.size)))
    found = None if level.stored is None else look_at(slide, level, stored_tiles_under(level, grid.xy, grid.extent))
    if found is None:
        return replace(grid, quality={**grid.quality, "verified": "not possible"})
    bad = tiles_on(level, found.checksums.numbers[found.suspect], grid.xy, grid.extent)
    bad = np.repeat(bad.reshape(-1, grid.region**2).any(axis=1), grid.region**2)
    if bad.mean() > MAX_SUSPECT:
        raise SlideError(
            f"{slide.path} has {bad.sum()} of {len(bad)} tiles whose stored pixels are damaged, or are not what a coarser "
            "level shows: get the file again, or tile it without --verify"
        )
    how = "against a coarser level" if found.compared else "decoded only: the slide has no coarser level"
    quality = {**grid.quality, "verified": how, "suspect_tiles": int(bad.sum())}
    return replace(grid.select(~bad), checksums=found.checksums, quality=quality)


def look_at(slide: Slide, level: Level, numbers: np.ndarray) -> Integrity:
    """Decodes the stored tiles `numbers` (int64 (M,), ascending) of a level, and compares them with a coarser one.

    The level must be one that is decoded directly: OpenSlide does not hand out what is stored.
    """
    stored = level.stored
    small = stored.shrunk(SHRINK) if not any(edge % SHRINK for edge in stored.tile) else stored
    values, suspect = np.zeros(len(numbers), np.uint64), np.zeros(len(numbers), bool)
    parts = parts_of(level)
    means = np.zeros((len(numbers), parts, parts, 3), np.uint8)
    pixels = np.empty((small.tile[1], small.tile[0], 3), np.uint8)
    for i, number in enumerate(numbers.tolist()):
        try:
            values[i] = xxh3_64_intdigest(stored.stored_bytes(slide.file, number))
            small.decode(slide.file, *divmod(number, stored.columns)[::-1], pixels)
        except ValueError:
            suspect[i] = True
        else:
            cv2.resize(pixels, (parts, parts), dst=means[i], interpolation=cv2.INTER_AREA)
    expected = means_on_a_coarser_level(slide, level, numbers)
    if expected is not None:
        difference = np.abs(means.astype(np.float32) - expected)  # NaN where there is nothing to compare
        suspect |= np.nanmax(difference, axis=(1, 2, 3), initial=0) > MAX_DIFFERENCE
    return Integrity(Checksums(level.number, numbers, values), suspect, expected is not None)


def means_on_a_coarser_level(slide: Slide, level: Level, numbers: np.ndarray) -> np.ndarray | None:
    """What the parts of stored tiles look like on a coarser level, float32 (M, parts, parts, 3), or None without one.

    NaN for parts outside the slide, and where the coarser level cannot be read.
    """
    tile, parts = np.array(level.stored.tile), parts_of(level)
    extent = tile * level.downsample
    coarser = slide.next_level(level)
    if coarser is None:
        return None
    each = max(1, int(extent.min() / max(coarser.downsample) / parts))  # pixels of the coarser level in a part
    rows, columns = np.divmod(numbers, level.stored.columns)
    corners = np.stack([columns, rows], axis=1) * tile  # (M, 2), pixels of the level
    shown, valid = slide.read_tiles(corners * level.downsample, parts * each, tuple(extent.tolist()))
    expected = np.asarray(shown).reshape(len(numbers), parts, each, parts, each, 3).mean(axis=(2, 4), dtype=np.float32)
    expected[~valid] = np.nan
    ends = corners[:, None] + (np.arange(parts) + 1)[:, None] * (tile / parts)  # (M, parts, 2)
    outside = ends > level.size
    expected[outside[:, :, 1]] = np.nan
    expected.transpose(0, 2, 1, 3)[outside[:, :, 0]] = np.nan
    return expected


def parts_of(level: Level) -> int:
    """How many parts a stored tile is divided into along each edge."""
    return max(1, round(min(level.stored.tile) / PART))


def stored_tiles_under(level: Level, xy: np.ndarray, extent: tuple[float, float]) -> np.ndarray:
    """The numbers of the stored tiles that tiles at `xy` (N, 2) of `extent` (level-0 pixels) need, int64, ascending."""
    scale, tile = np.array(level.downsample), np.array(level.stored.tile)
    first = np.rint(xy / scale).astype(np.int64) // tile
    last = (np.rint(xy / scale) + np.rint(extent / scale) - 1).astype(np.int64) // tile
    last = np.minimum(last, [level.stored.columns - 1, level.stored.rows - 1])
    needed = np.zeros((level.stored.rows, level.stored.columns), bool)
    for (left, top), (right, bottom) in zip(first.tolist(), last.tolist()):
        needed[top : bottom + 1, left : right + 1] = True
    return np.flatnonzero(needed)


def tiles_on(level: Level, numbers: np.ndarray, xy: np.ndarray, extent: tuple[float, float]) -> np.ndarray:
    """Which of the tiles at `xy` (N, 2) need one of the stored tiles `numbers`, bool (N,)."""
    bad = np.zeros((level.stored.rows, level.stored.columns), bool)
    bad.ravel()[numbers] = True
    return tissue_fraction(Tissue(bad, tuple(np.multiply(level.stored.tile, level.downsample))), xy, extent) > 0
