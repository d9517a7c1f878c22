"""Reads pixels of a whole-slide image at a physical resolution: positions in level-0 pixels, sizes in output pixels.

What is cut from a slide is always a whole number of stored pixels, so that nothing is interpolated where nothing has to
be; where sizes differ, `cutting.resample` averages over areas. A level of JPEG tiles is decoded directly, every other by
OpenSlide, with the same pixels.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from PIL import Image, ImageCms

from ..errors import SlideError
from .cutting import WHITE, cut_tiles, resample
from .stored import Checksums, SlideLayout, StoredLevel, find_layout


SUFFIXES = frozenset(
    [".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"]
)  # what OpenSlide 4 opens; a .mrxs brings a folder of its own along
MAX_PIXELS = 1e12  # of level 0; the largest scans have some 1e11, a damaged header claims anything
MAX_PIXELS_PER_BYTE = 10_000  # of the file; JPEG of mere white has some 100
ONE_FILE = frozenset(
    [".svs", ".tif", ".tiff", ".ndpi", ".scn", ".svslide", ".bif", ".czi"]
)  # and not a folder beside it
MPP_TOLERANCE = 0.005  # scanners state their resolution with no more accuracy
BLOCK_PIXELS = 4 << 20  # that OpenSlide is asked for at once
BAND_PIXELS = 16 << 20  # of a level that are in memory at once while an overview is made
BAND_CELL = 1024  # pixels: what OpenSlide cannot read of an overview is left out in pieces of this edge
MAX_UNREADABLE = 0.01  # share of an overview
OPENING = threading.Lock()  # threads share a slide, and open it once
LEVEL_ROUNDING = 1.005  # level sizes are rounded, and so are the downsamples computed from them


@dataclass(frozen=True)
class Level:
    """Pixels that can be read: a level of the slide, as stored or decoded at a fraction of its size.

    Attributes:
        number: of the level in the file.
        size: width and height in pixels.
        downsample: level-0 pixels per pixel (x, y).
        stored: how to decode it directly, or None when OpenSlide reads it.
    """

    number: int
    size: tuple[int, int]
    downsample: tuple[float, float]
    stored: StoredLevel | None

    @property
    def shrunk(self) -> bool:
        """Whether it is decoded at a fraction of its size."""
        return self.stored is not None and self.stored.shrink > 1


class Slide:
    """A whole-slide image that opens on first use, and again after a read error or in another process.

    Args:
        path: a file that OpenSlide opens.
        mpp: microns per pixel of level 0, a number or (x, y), for slides that do not declare it, or declare it wrongly.
        layout: how the file is stored, when that was found before: then OpenSlide is asked for nothing that it says.
        icc: convert pixels to sRGB by the colour profile in the slide; a slide without profile stays as it is.
        half_scale: decode JPEG at half, a quarter or an eighth of its size where the resolution asked for allows it: faster,
            and not the same pixels (docs/benchmarks.md says how near).
        checksums: of stored tiles that were looked at before; a tile that has changed since cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        mpp: float | tuple[float, float] | None = None,
        *,
        layout: SlideLayout | None = None,
        icc: bool = False,
        half_scale: bool = False,
        checksums: Checksums | None = None,
    ):
        self._handle: openslide.OpenSlide | None = None
        self._file: int | None = None
        self.path = Path(path)
        self.icc, self.half_scale = icc, half_scale
        self._given_mpp = (mpp, mpp) if isinstance(mpp, int | float) else mpp
        self._layout, self._checksums = layout, checksums
        self._to_srgb: ImageCms.ImageCmsTransform | None = None
        self._levels: tuple[Level, ...] = ()

    def __repr__(self) -> str:
        return f"Slide({str(self.path)!r})"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None, "_file": None, "_to_srgb": None, "_levels": ()}

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; the next read opens it again."""
        self._handle = None  # OpenSlide closes it when the last thread that reads from it is done
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def handle(self) -> openslide.OpenSlide:
        """The open OpenSlide object. Raises SlideError when the file cannot be opened."""
        with OPENING:
            handle = self._handle or self._open_handle()
            self._handle = handle
        return handle

    def _open_handle(self) -> openslide.OpenSlide:
        if not self.path.is_file():
            raise SlideError(f"{self.path} does not exist")
        try:
            handle = openslide.OpenSlide(self.path)
        except openslide.OpenSlideError as error:
            raise SlideError(
                f"{self.path} is no slide that OpenSlide can open ({error}): "
                "check that the file is whole and of a supported format"
            ) from error
        width, height = handle.dimensions
        size = self.path.stat().st_size
        if width * height > MAX_PIXELS or (
            self.path.suffix in ONE_FILE and width * height > MAX_PIXELS_PER_BYTE * size
        ):
            raise SlideError(
                f"{self.path} claims {width}x{height} pixels in {size:,} bytes: it is damaged, get it again"
            )
        return handle

    @property
    def file(self) -> int:
        """The descriptor of the open file. Raises SlideError when it is gone, or not the one whose layout is known."""
        layout = self.layout
        with OPENING:
            if self._file is None:
                try:
                    file = os.open(self.path, os.O_RDONLY)
                except OSError as error:
                    raise SlideError(f"{self.path} cannot be opened: {error.strerror}") from error
                if not layout.matches(os.fstat(file)):
                    os.close(file)
                    raise SlideError(f"{self.path} has changed since it was tiled: tile it again")
                self._file = file
            return self._file

    @property
    def layout(self) -> SlideLayout:
        """How the file is stored."""
        if self._layout is None:
            with self._open_handle() as handle:  # one of its own, which may fail on damaged pixels
                self._layout = find_layout(self.path, handle)
        return self._layout

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height of level 0 in pixels."""
        return self._layout.level_sizes[0] if self._layout else self.handle.dimensions

    @property
    def mpp(self) -> tuple[float, float]:
        """Microns per level-0 pixel, (x, y). Raises SlideError when neither the slide nor the caller says."""
        if self._given_mpp is not None:
            mpp = self._given_mpp
        else:
            properties = self.handle.properties
            try:
                mpp = (
                    float(properties[openslide.PROPERTY_NAME_MPP_X]),
                    float(properties[openslide.PROPERTY_NAME_MPP_Y]),
                )
            except (KeyError, ValueError):
                raise SlideError(
                    f"{self.path} does not declare its resolution: pass --slide-mpp, "
                    "or add a column 'mpp' to the cohort table"
                ) from None
        if not all(np.isfinite(value) and value > 0 for value in mpp):
            raise SlideError(
                f"{self.path} has a resolution of {mpp} microns per pixel: pass the true one as --slide-mpp"
            )
        return mpp

    def extent(self, size: float, mpp: float) -> tuple[float, float]:
        """The edge (x, y) in level-0 pixels of `size` output pixels at `mpp`: floats, since scanners are not round."""
        mpp_x, mpp_y = self.mpp
        return size * mpp / mpp_x, size * mpp / mpp_y

    def level_for(self, scale: tuple[float, float], half_scale: bool | None = None) -> Level:
        """The coarsest level that is at least as fine, on both axes, as `scale` level-0 pixels per output pixel.

        Args:
            half_scale: whether decoding at a fraction of the size will do; as the slide was opened when None.
        """
        half_scale = self.half_scale if half_scale is None else half_scale
        if not self._levels:
            self._levels = _levels_of(self.layout)
        fine = min(scale) * LEVEL_ROUNDING
        usable = [
            level for level in self._levels if max(level.downsample) <= fine and (half_scale or not level.shrunk)
        ]
        usable = usable or self._levels[:1]
        coarsest = max(max(level.downsample) for level in usable)
        as_coarse = [level for level in usable if max(level.downsample) * LEVEL_ROUNDING >= coarsest]
        return max(as_coarse, key=lambda level: level.number)  # of which fewest stored tiles have to be decoded

    def as_stored(self, level: Level) -> Level:
        """The level that `level` is decoded from, at its full size."""
        return next(each for each in self._levels if each.number == level.number)

    def next_level(self, level: Level) -> Level | None:
        """The level of the file that is next coarser than `level`, or None."""
        return next((each for each in self._levels if each.number == level.number + 1), None)

    def whole_extent(
        self, size: int, mpp: float, tolerance: float = MPP_TOLERANCE, parts: int = 1
    ) -> tuple[float, float]:
        """The edge (x, y), in level-0 pixels, of tiles of `size` output pixels at `mpp` that can be cut without a remainder.

        It is a whole number of stored pixels on the level that is read. Within `tolerance` (a share of `mpp`) of the exact
        edge, one that fits the stored tiles is preferred, then one that is a multiple of `size`; else the nearest.

        Args:
            parts: 1, or into how many equal parts each edge must be divisible (regions of tiles).
        """
        exact = self.extent(size, mpp)
        level = self.level_for((exact[0] / size, exact[1] / size))
        wanted = [edge / scale for edge, scale in zip(exact, level.downsample)]  # stored pixels
        for fitting in (_fitting_stored_tile, _multiple_of_size, _nearest):
            stored = level.stored.tile if level.stored else (0, 0)
            whole = [parts * fitting(edge / parts, size // parts, own) for edge, own in zip(wanted, stored)]
            if fitting is _nearest or all(abs(have / edge - 1) <= tolerance for have, edge in zip(whole, wanted)):
                return whole[0] * level.downsample[0], whole[1] * level.downsample[1]
        raise AssertionError("the nearest whole number always fits")

    def read(self, xy: tuple[float, float], size: tuple[int, int], mpp: float) -> np.ndarray:
        """The pixels right and below of `xy` (level-0 pixels) as `size` (width, height) output pixels at `mpp`.

        Reads the coarsest level that is at least as fine as `mpp`; what lies outside the scanned area is white. Both
        corners are rounded to pixels of that level. Returns uint8 (height, width, 3). Raises SlideError when the stored
        pixels cannot be decoded.
        """
        extent = self.extent(size[0], mpp)[0], self.extent(size[1], mpp)[1]
        out = np.empty((1, size[1], size[0], 3), np.uint8)
        if not self._cut(np.asarray([xy], float), size, extent, out).all():
            raise _unreadable(self.path, (round(xy[0]), round(xy[1])), 0)
        return out[0]

    def read_tiles(
        self, xy: np.ndarray, size: int, extent: tuple[float, float], out: Sequence[np.ndarray] | None = None
    ) -> tuple[Sequence[np.ndarray], np.ndarray]:
        """Square tiles at the corners `xy` (N, 2), uint8 (N, size, size, 3), and which of them are valid, bool (N,).

        Neighbours should come together: each stored tile that they share is decoded once.

        Args:
            extent: edge (x, y) of a tile in level-0 pixels.
            out: arrays of uint8 (size, size, 3) to write to; new ones when None.

        A tile whose stored pixels cannot be decoded is marked invalid and left black; it must not be used. Raises
        SlideError when the slide cannot be opened, or has changed since its layout was found.
        """
        if out is None:
            out = np.empty((len(xy), size, size, 3), np.uint8)
        return out, self._cut(np.asarray(xy), (size, size), extent, out)

    def overview(self, max_edge: int) -> tuple[np.ndarray, tuple[float, float]]:
        """The whole slide with its longer edge at most `max_edge` pixels, uint8 (h, w, 3), and its pixel's extent.

        The extent is (x, y) in level-0 pixels per overview pixel, exact. Needs no mpp. JPEG is decoded at a fraction of its
        size where that suffices. What cannot be decoded is white; raises SlideError when that is more than 1 %.
        """
        full = np.asarray(self.dimensions)
        width, height = np.maximum(1, np.ceil(full / max(1.0, full.max() / max_edge)).astype(int)).tolist()
        scale = full[0] / width, full[1] / height
        level = self.level_for(scale, half_scale=True)
        picture = np.empty((height, width, 3), np.uint8)
        band = max(1, int(BAND_PIXELS / level.size[0] * height / level.size[1]))  # rows of the overview
        lost = 0.0  # share of the slide
        for top in range(0, height, band):
            rows = picture[top : top + band]
            first, last = (round(row * level.size[1] / height) for row in (top, top + len(rows)))
            pixels, unreadable_share = self._read_band(level, first, max(first + 1, last))
            lost += unreadable_share * len(rows) / height
            resample(pixels, rows)
        if lost > MAX_UNREADABLE:
            raise SlideError(f"{self.path} cannot be decoded over {lost:.1%} of its area: get it again")
        return self._in_srgb(picture), scale

    def _read_band(self, level: Level, first: int, last: int) -> tuple[np.ndarray, float]:
        """The rows from `first` to `last` of a level, uint8 (h, w, 3), and which share of them is white as it is unreadable."""
        edges = level.stored.tile if level.stored else (BAND_CELL, BAND_CELL)
        top = first - first % edges[1]
        columns, rows = -(-level.size[0] // edges[0]), -(-(last - top) // edges[1])
        canvas = np.empty((rows * edges[1], columns * edges[0], 3), np.uint8)
        cells = [(x * edges[0], y * edges[1]) for y in range(rows) for x in range(columns)]
        parts = [canvas[y : y + edges[1], x : x + edges[0]] for x, y in cells]
        valid = self._cut_level(level, [(x, top + y) for x, y in cells], edges, parts)
        for part, readable in zip(parts, valid):
            if not readable:
                part.fill(WHITE)
        return canvas[first - top : last - top, : level.size[0]], float((~valid).mean())

    def _cut(
        self, xy: np.ndarray, size: tuple[int, int], extent: tuple[float, float], out: Sequence[np.ndarray]
    ) -> np.ndarray:
        level = self.level_for((extent[0] / size[0], extent[1] / size[1]))
        source = tuple(max(1, round(edge / scale)) for edge, scale in zip(extent, level.downsample))
        corners = np.rint(xy / level.downsample).astype(np.int64).tolist()
        valid = self._cut_level(level, [tuple(corner) for corner in corners], source, out)
        if self.icc:
            for tile, good in zip(out, valid):
                if good:
                    np.copyto(tile, self._in_srgb(tile))
        return valid

    def _cut_level(
        self,
        level: Level,
        corners: list[tuple[int, int]],
        source: tuple[int, int],
        out: Sequence[np.ndarray],
    ) -> np.ndarray:
        """Cuts tiles of `source` pixels at `corners` (pixels of the level) into `out`; which are valid, bool (N,)."""
        if level.stored is not None:
            looked_at = self._checksums if self._checksums and self._checksums.level == level.number else None
            return cut_tiles(level.stored, self.file, corners, source, out, looked_at)
        first, last = np.min(corners, axis=0), np.max(corners, axis=0) + source
        together = int(np.prod(last - first))
        wasted = together > 1.5 * len(corners) * source[0] * source[1]
        if len(corners) == 1 or not (wasted or together > BLOCK_PIXELS):
            block = self._read_region(level, tuple(first.tolist()), tuple((last - first).tolist()))
            if block is not None:
                for (x, y), tile in zip(corners - first, out):
                    resample(block[y : y + source[1], x : x + source[0]], tile)
            elif len(corners) == 1:
                out[0].fill(0)
            if block is not None or len(corners) == 1:
                return np.full(len(corners), block is not None)
        half = len(corners) // 2
        parts = (slice(half), slice(half, None))
        return np.concatenate([self._cut_level(level, corners[part], source, out[part]) for part in parts])

    def _read_region(self, level: Level, xy: tuple[int, int], size: tuple[int, int]) -> np.ndarray | None:
        """Pixels of a level by OpenSlide, uint8 (h, w, 3), or None when they cannot be decoded."""
        handle = self.handle
        place = round(xy[0] * level.downsample[0]), round(xy[1] * level.downsample[1])
        try:
            rgba = np.asarray(handle.read_region(place, level.number, size))
        except openslide.OpenSlideError:
            self._handle = None  # OpenSlide refuses every further read on a handle that failed once
            return None
        pixels, alpha = rgba[..., :3], rgba[..., 3:]
        if alpha.min() == 255:
            return pixels
        background = bytes.fromhex(handle.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff"))
        share = alpha.astype(np.float32) / 255
        return np.rint(pixels * share + np.frombuffer(background, np.uint8) * (1 - share)).astype(np.uint8)

    def _in_srgb(self, pixels: np.ndarray) -> np.ndarray:
        """`pixels` converted by the slide's colour profile, when that was asked for and there is one."""
        if not self.icc:
            return pixels
        if self._to_srgb is None:
            profile = self.handle.color_profile
            if profile is None:
                return pixels
            intent = ImageCms.getDefaultIntent(profile)
            self._to_srgb = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "RGB", "RGB", intent)
        return np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), self._to_srgb))


def _levels_of(layout: SlideLayout) -> tuple[Level, ...]:
    """The levels of a slide, level 0 first, each followed by what decoding it at a fraction of its size gives."""
    levels = []
    for number, (size, stored) in enumerate(zip(layout.level_sizes, layout.stored)):
        downsample = tuple(full / edge for full, edge in zip(layout.level_sizes[0], size))
        levels.append(Level(number, size, downsample, stored))
        for shrink in (2, 4, 8):
            if stored is not None and not (stored.tile[0] % shrink or stored.tile[1] % shrink):
                small = stored.shrunk(shrink)
                coarser = downsample[0] * shrink, downsample[1] * shrink
                levels.append(Level(number, small.size, coarser, small))
    return tuple(levels)


def _fitting_stored_tile(wanted: float, size: int, stored: int) -> int:
    """The whole number nearest to `wanted` that is a multiple of a stored tile's edge, or divides it; 0 when unknown."""
    if not stored:
        return 0
    if wanted >= stored:
        return stored * round(wanted / stored)
    parts = max(1, round(stored / wanted))
    return stored // parts if stored % parts == 0 else 0


def _multiple_of_size(wanted: float, size: int, stored: int) -> int:
    """The multiple of `size` nearest to `wanted`, which is resampled fast and evenly, or not at all."""
    return size * round(wanted / size)


def _nearest(wanted: float, size: int, stored: int) -> int:
    return max(1, round(wanted))


def _unreadable(path: Path, place: tuple[int, int], level: int) -> SlideError:
    """The error of a slide whose pixels at `place` (level-0 pixels) cannot be decoded."""
    return SlideError(f"{path} cannot be read at {place}, level {level}: its stored pixels are damaged; get it again")
