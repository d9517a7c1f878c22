"""Reads pixels of a whole-slide image at a physical resolution: positions in level-0 pixels, sizes in output pixels."""

from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from ..errors import SlideError


SUFFIXES = frozenset(
    [".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"]
)  # what OpenSlide 4 opens; a .mrxs brings a folder of its own along
RESAMPLING = Image.Resampling.BICUBIC  # Pillow's: antialiased, and exact for boxes with fractional corners


class Slide:
    """A whole-slide image that opens on first use, and again after a read error or in another process.

    Args:
        path: a file that OpenSlide opens.
        mpp: microns per pixel of level 0, a number or (x, y), for slides that do not declare it, or declare it wrongly.
    """

    def __init__(self, path: str | Path, mpp: float | tuple[float, float] | None = None):
        self.path = Path(path)
        self._given_mpp = (mpp, mpp) if isinstance(mpp, int | float) else mpp
        self._handle: openslide.OpenSlide | None = None

    def __repr__(self) -> str:
        return f"Slide({str(self.path)!r})"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; the next read opens it again."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    @property
    def handle(self) -> openslide.OpenSlide:
        """The open OpenSlide object. Raises SlideError when the file cannot be opened."""
        if self._handle is None:
            if not self.path.is_file():
                raise SlideError(f"{self.path} does not exist")
            try:
                self._handle = openslide.OpenSlide(self.path)
            except openslide.OpenSlideError as error:
                raise SlideError(
                    f"{self.path} is no slide that OpenSlide can open ({error}): "
                    "check that the file is whole and of a supported format"
                ) from error
        return self._handle

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height of level 0 in pixels."""
        return self.handle.dimensions

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

    def read(self, xy: tuple[float, float], size: tuple[int, int], mpp: float) -> np.ndarray:
        """The pixels right and below of `xy` (level-0 pixels) as `size` (width, height) output pixels at `mpp`.

        Reads the coarsest level that is at least as fine as `mpp`, then resamples with Pillow's antialiased bicubic
        kernel; what lies outside the scanned area is white. Returns uint8 (height, width, 3). Raises SlideError when
        the stored pixels cannot be decoded.
        """
        width, height = self.extent(size[0], mpp)[0], self.extent(size[1], mpp)[1]
        level = self._level_for(max(width / size[0], height / size[1]), min(width / size[0], height / size[1]))
        scale_x, scale_y = (full / part for full, part in zip(self.dimensions, self.handle.level_dimensions[level]))
        left, top = xy[0] / scale_x, xy[1] / scale_y
        right, bottom = left + width / scale_x, top + height / scale_y
        first_x, first_y = int(np.floor(left + 1e-6)), int(np.floor(top + 1e-6))
        stored = (int(np.ceil(right - 1e-6)) - first_x, int(np.ceil(bottom - 1e-6)) - first_y)
        image = self._read_level((round(first_x * scale_x), round(first_y * scale_y)), level, stored)
        box = (left - first_x, top - first_y, min(right - first_x, stored[0]), min(bottom - first_y, stored[1]))
        box = tuple(max(0.0, edge) for edge in box)
        if stored == tuple(size) and np.allclose(box, (0, 0, *size), atol=1e-3):
            return np.asarray(image)
        return np.asarray(image.resize(size, RESAMPLING, box=box))

    def read_tiles(self, xy: np.ndarray, size: int, mpp: float) -> tuple[np.ndarray, np.ndarray]:
        """Square tiles at the corners `xy` (N, 2), uint8 (N, size, size, 3), and which of them are valid, bool (N,).

        A tile whose stored pixels cannot be decoded is marked invalid and left black; it must not be used.
        """
        tiles = np.zeros((len(xy), size, size, 3), np.uint8)
        valid = np.ones(len(xy), bool)
        for i, corner in enumerate(xy):
            try:
                tiles[i] = self.read((float(corner[0]), float(corner[1])), (size, size), mpp)
            except SlideError:
                valid[i] = False
        return tiles, valid

    def overview(self, max_edge: int) -> tuple[np.ndarray, tuple[float, float]]:
        """The whole slide with its longer edge at most `max_edge` pixels, uint8 (h, w, 3), and its pixel's extent.

        The extent is (x, y) in level-0 pixels per overview pixel, exact. Needs no mpp.
        """
        full = np.asarray(self.dimensions)
        size = np.maximum(1, np.ceil(full / max(1.0, full.max() / max_edge)).astype(int))
        level = self._level_for(*np.sort(full / size)[::-1])
        image = self._read_level((0, 0), level, self.handle.level_dimensions[level])
        return np.asarray(image.resize(tuple(size.tolist()), RESAMPLING, reducing_gap=3.0)), tuple(full / size)

    def _level_for(self, coarse: float, fine: float) -> int:
        """The coarsest level whose downsample exceeds neither axis's, with room for the rounding of level sizes."""
        downsamples = self.handle.level_downsamples
        return max(level for level in range(len(downsamples)) if level == 0 or downsamples[level] <= fine * 1.005)

    def _read_level(self, xy: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        handle = self.handle
        try:
            rgba = handle.read_region(xy, level, size)
        except openslide.OpenSlideError as error:
            self.close()  # OpenSlide refuses every further read on a handle that failed once
            raise SlideError(f"{self.path} cannot be read at {xy}, level {level} ({error})") from error
        background = "#" + handle.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        image = Image.new("RGB", rgba.size, background)
        image.paste(rgba, mask=rgba.getchannel("A"))
        return image
