"""The grid of tiles of one slide: made once, saved, then streamed, embedded and drawn by everything downstream."""

from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from ..errors import SlideError
from .reader import Slide
from .store import load_arrays, save_arrays
from .tissue import Tissue


@dataclass(frozen=True)
class TileGrid:
    """Where the tiles of one slide are.

    Attributes:
        slide: the slide's key in its cohort (its path relative to the slide folder).
        size: edge of a tile in output pixels.
        mpp: microns per output pixel that were asked for, and that `Slide.read` delivers exactly.
        slide_mpp: microns per level-0 pixel (x, y) that the grid was made with, override included.
        extent: edge (x, y) of a tile in level-0 pixels.
        stride: distance (x, y) between neighbouring tiles in level-0 pixels.
        slide_size: width and height of level 0.
        min_tissue: share of a tile's area that had to be tissue.
        xy: int64 (N, 2), top-left corners in level-0 pixels, row by row.
        tissue_fraction: float32 (N,), the share of a tile's area that is tissue.
    """

    slide: str
    size: int
    mpp: float
    slide_mpp: tuple[float, float]
    extent: tuple[float, float]
    stride: tuple[float, float]
    slide_size: tuple[int, int]
    min_tissue: float
    xy: np.ndarray
    tissue_fraction: np.ndarray

    def __len__(self) -> int:
        return len(self.xy)

    @property
    def cells(self) -> np.ndarray:
        """Column and row of every tile in the full lattice of the slide, int64 (N, 2)."""
        return np.rint(self.xy / self.stride).astype(np.int64)

    def save(self, path: str | Path) -> None:
        """Writes the grid as one safetensors file of some kilobytes."""
        fields = asdict(self)
        arrays = {"xy": fields.pop("xy"), "tissue_fraction": fields.pop("tissue_fraction")}
        save_arrays(path, arrays, {"kind": "tile_grid", **fields})

    @classmethod
    def load(cls, path: str | Path) -> "TileGrid":
        """The grid saved at `path`. Raises UserError when it is missing or damaged."""
        arrays, fields = load_arrays(path)
        fields.pop("kind", None)
        for name in ("slide_mpp", "extent", "stride", "slide_size"):
            fields[name] = tuple(fields[name])
        return cls(**fields, **arrays)


def tile_grid(
    slide: Slide,
    tissue: Tissue,
    *,
    key: str,
    size: int,
    mpp: float,
    stride: int | None = None,
    min_tissue: float = 0.5,
) -> TileGrid:
    """The tiles of `slide` that lie inside it and are tissue over at least `min_tissue` of their area.

    Args:
        key: the slide's key in its cohort.
        size: edge of a tile in output pixels.
        mpp: microns per output pixel.
        stride: distance between tiles in output pixels; `size` (no overlap) when None.
        min_tissue: between 0 and 1, measured exactly over the tile's area.

    The lattice starts at (0, 0); tiles that would leave the slide are not made. Each corner is rounded to a level-0
    pixel by itself, so rounding never adds up. Raises SlideError when the slide is smaller than one tile, or has none.
    """
    extent = slide.extent(size, mpp)
    step = slide.extent(stride or size, mpp)
    counts = [int(np.floor((edge - tile) / gap + 1e-6)) + 1 for edge, tile, gap in zip(slide.dimensions, extent, step)]
    if min(slide.dimensions[0] - extent[0], slide.dimensions[1] - extent[1]) < -1e-6:
        width, height = (edge * own / mpp for edge, own in zip(slide.dimensions, slide.mpp))
        raise SlideError(
            f"{slide.path} is smaller than one tile: {width:.0f}x{height:.0f} px at {mpp} mpp, and a tile is {size} px; "
            "choose a smaller --size or --mpp"
        )
    columns, rows = np.meshgrid(np.arange(counts[0]), np.arange(counts[1]))
    xy = np.rint(np.stack([columns.ravel() * step[0], rows.ravel() * step[1]], axis=1)).astype(np.int64)
    fraction = tissue_fraction(tissue, xy, extent)
    keep = fraction >= min_tissue
    if not keep.any():
        raise SlideError(
            f"{slide.path} has no tile with {min_tissue:.0%} tissue (tissue covers {tissue.mask.mean():.1%} of the slide): "
            "leave the slide out, or lower --min-tissue"
        )
    return TileGrid(
        slide=key,
        size=size,
        mpp=mpp,
        slide_mpp=slide.mpp,
        extent=extent,
        stride=step,
        slide_size=slide.dimensions,
        min_tissue=min_tissue,
        xy=xy[keep],
        tissue_fraction=fraction[keep],
    )


def tissue_fraction(tissue: Tissue, xy: np.ndarray, extent: tuple[float, float]) -> np.ndarray:
    """The share of each box (corner `xy` (N, 2), edge `extent`, level-0 pixels) that is tissue, float32 (N,).

    Exact for fractional corners: the integral image of the mask is bilinear within a mask pixel.
    """
    integral = cv2.integral(tissue.mask.astype(np.uint8), sdepth=cv2.CV_64F)  # (h + 1, w + 1)

    def area(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Tissue area left of x and above y, in mask pixels."""
        x = np.clip(x / tissue.extent[0], 0, integral.shape[1] - 1)
        y = np.clip(y / tissue.extent[1], 0, integral.shape[0] - 1)
        x0, y0 = np.minimum(x.astype(int), integral.shape[1] - 2), np.minimum(y.astype(int), integral.shape[0] - 2)
        fx, fy = x - x0, y - y0
        upper = integral[y0, x0] * (1 - fx) + integral[y0, x0 + 1] * fx
        lower = integral[y0 + 1, x0] * (1 - fx) + integral[y0 + 1, x0 + 1] * fx
        return upper * (1 - fy) + lower * fy

    left, top = xy[:, 0].astype(float), xy[:, 1].astype(float)
    right, bottom = left + extent[0], top + extent[1]
    inside = area(right, bottom) - area(left, bottom) - area(right, top) + area(left, top)
    return (inside * tissue.extent[0] * tissue.extent[1] / (extent[0] * extent[1])).astype(np.float32)
