"""The grid of tiles of one slide: made once, saved, then streamed, embedded and drawn by everything downstream."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import SlideError, UserError
from .reader import MPP_TOLERANCE, Slide
from .store import load_arrays, save_arrays
from .stored import Checksums, SlideLayout
from .tissue import Tissue


MAX_CANDIDATES = (
    10**8
)  # tiles with and without tissue; a slide that would have more is damaged, or the tiles are too small


@dataclass(frozen=True)
class TileGrid:
    """Where the tiles of one slide are, and how they are read from it.

    Attributes:
        slide: the slide's key in its cohort (its path relative to the slide folder).
        size: edge of a tile in output pixels.
        mpp: microns per output pixel that were asked for; see `effective_mpp`.
        slide_mpp: microns per level-0 pixel (x, y) that the grid was made with, override included.
        extent: edge (x, y) of a tile in level-0 pixels.
        stride: distance (x, y) between neighbouring tiles in level-0 pixels.
        slide_size: width and height of level 0.
        xy: int64 (N, 2), top-left corners in level-0 pixels, row by row.
        tissue_fraction: float32 (N,), the share of a tile's area that is tissue; NaN where nobody measured it.
        region: R, when each R * R consecutive tiles are one region, row by row; 1 when there are none.
        classes: names of annotated classes.
        class_fraction: float32 (N, C), the share of a tile's area that each class covers.
        icc, half_scale: how pixels are read, see `Slide`.
        stored: how the slide's file is stored, so that it need not be parsed again; None when unknown.
        checksums: of the stored tiles that were looked at (`integrity.py`); None when nobody looked.
        quality: what may be wrong with the slide, see `quality.QualityNumbers`; empty when nobody looked.
        options: what the grid was made with, for telling whether it has to be made again.
    """

    slide: str
    size: int
    mpp: float
    slide_mpp: tuple[float, float]
    extent: tuple[float, float]
    stride: tuple[float, float]
    slide_size: tuple[int, int]
    xy: np.ndarray
    tissue_fraction: np.ndarray
    region: int = 1
    classes: tuple[str, ...] = ()
    class_fraction: np.ndarray | None = None
    icc: bool = False
    half_scale: bool = False
    stored: SlideLayout | None = None
    checksums: Checksums | None = None
    quality: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.xy)

    @property
    def effective_mpp(self) -> tuple[float, float]:
        """Microns per output pixel (x, y) that reading delivers.

        Within half a percent of `mpp`, or half a stored pixel in a tile's edge, unless another tolerance was asked for.
        """
        return tuple(edge * own / self.size for edge, own in zip(self.extent, self.slide_mpp))

    @property
    def cells(self) -> np.ndarray:
        """Column and row of every tile in the full lattice of the slide, int64 (N, 2)."""
        return np.rint(self.xy / self.stride).astype(np.int64)

    def open(self, path: str | Path) -> Slide:
        """The slide at `path`, to be read as this grid was made."""
        return Slide(
            path,
            self.slide_mpp,
            layout=self.stored,
            icc=self.icc,
            half_scale=self.half_scale,
            checksums=self.checksums,
        )

    def select(self, rows: np.ndarray) -> "TileGrid":
        """The grid with only these tiles (indices, or bool (N,)), in this order."""
        shares = None if self.class_fraction is None else self.class_fraction[rows]
        return replace(self, xy=self.xy[rows], tissue_fraction=self.tissue_fraction[rows], class_fraction=shares)

    def save(self, path: str | Path) -> None:
        """Writes the grid as one safetensors file of some kilobytes."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        arrays = {name: values.pop(name) for name in ARRAYS}
        checksums = values.pop("checksums")
        if checksums is not None:
            values["checked_level"] = checksums.level
            arrays |= {"stored_tiles": checksums.numbers, "stored_checksums": checksums.values}
        values["stored"] = None if self.stored is None else self.stored.to_json()
        arrays = {name: array for name, array in arrays.items() if array is not None}
        save_arrays(path, arrays, {"kind": "tile_grid", **values})

    @classmethod
    def load(cls, path: str | Path, mapped: bool = False) -> "TileGrid":
        """The grid saved at `path`, its arrays `mapped` (see `load_arrays`) or copied into memory.

        Raises UserError when it is missing or damaged.
        """
        arrays, values = load_arrays(path, mapped=mapped)
        try:
            if values.pop("kind") != "tile_grid":
                raise KeyError("tile_grid")
            for name in ("slide_mpp", "extent", "stride", "slide_size", "classes"):
                values[name] = tuple(values[name])
            values["stored"] = values["stored"] and SlideLayout.from_json(values["stored"])
            if "checked_level" in values:
                looked_at = arrays.pop("stored_tiles"), arrays.pop("stored_checksums")
                values["checksums"] = Checksums(values.pop("checked_level"), *looked_at)
            return cls(**values, **arrays)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is no grid of this version ({error}): delete it and tile again") from error


ARRAYS = ("xy", "tissue_fraction", "class_fraction")


def tile_grid(
    slide: Slide,
    tissue: Tissue,
    *,
    key: str,
    size: int,
    mpp: float,
    stride: int | None = None,
    min_tissue: float = 0.5,
    mpp_tolerance: float = MPP_TOLERANCE,
    region: int = 1,
    partial: bool = False,
) -> TileGrid:
    """The tiles of `slide` that are tissue over at least `min_tissue` of their area.

    Args:
        key: the slide's key in its cohort.
        size: edge of a tile in output pixels.
        mpp: microns per output pixel.
        stride: distance between tiles (regions) in output pixels; no overlap when None.
        min_tissue: between 0 and 1, measured exactly over the area of a tile (a region).
        mpp_tolerance: share of `mpp` by which the effective one may differ so that a tile falls on stored tiles or needs no
            interpolation; see `Slide.whole_extent`.
        region: R lays regions of R * R tiles and keeps or drops them whole.
        partial: also tiles (regions) that leave the slide at its right and lower edge; they are white there, and glass.

    The lattice starts at (0, 0). Tiles and the distances between them are whole numbers of stored pixels, so that nothing
    is rounded when they are read. Raises SlideError when the slide is smaller than one tile, or has none.
    """
    whole = slide.whole_extent(size * region, mpp, mpp_tolerance, parts=region)
    scale = slide.level_for((whole[0] / (size * region), whole[1] / (size * region))).downsample
    share = (stride or size * region) / (size * region)
    step = tuple(max(1, round(edge * share / own)) * own for edge, own in zip(whole, scale))
    counts = [_places(edge, own, gap, partial) for edge, own, gap in zip(slide.dimensions, whole, step)]
    if min(counts) < 1:
        width, height = (edge * own / mpp for edge, own in zip(slide.dimensions, slide.mpp))
        what = "tile" if region == 1 else "region"
        raise SlideError(
            f"{slide.path} is smaller than one {what}: {width:.0f}x{height:.0f} px at {mpp} mpp, and a {what} is "
            f"{size * region} px; choose a smaller --size or --mpp, or --partial"
        )
    if counts[0] * counts[1] > MAX_CANDIDATES:
        raise SlideError(f"{slide.path} would have {counts[0] * counts[1]:,} tiles: choose a larger --size or --mpp")
    columns, rows = np.meshgrid(np.arange(counts[0]), np.arange(counts[1]))
    corners = np.stack([columns.ravel() * step[0], rows.ravel() * step[1]], axis=1)  # (candidates, 2)
    corners = corners[tissue_fraction(tissue, corners, whole) >= min_tissue]
    if not len(corners):
        raise SlideError(
            f"{slide.path} has no tile with {min_tissue:.0%} tissue (tissue covers {tissue.mask.mean():.1%} of the slide): "
            "leave the slide out, or lower --min-tissue"
        )
    extent = whole[0] / region, whole[1] / region
    within = np.stack(np.meshgrid(np.arange(region), np.arange(region)), axis=-1).reshape(-1, 2) * extent
    xy = np.rint((corners[:, None] + within).reshape(-1, 2)).astype(np.int64)
    return TileGrid(
        slide=key,
        size=size,
        mpp=mpp,
        slide_mpp=slide.mpp,
        extent=extent,
        stride=step if region == 1 else extent,
        slide_size=slide.dimensions,
        xy=xy,
        tissue_fraction=tissue_fraction(tissue, xy, extent),
        region=region,
        icc=slide.icc,
        half_scale=slide.half_scale,
        stored=slide.layout,
    )


def _places(edge: int, tile: float, step: float, partial: bool) -> int:
    """How many tiles lie side by side within `edge`, all in level-0 pixels."""
    if partial:
        return max(1, int(np.ceil((edge - tile) / step - 1e-6)) + 1)
    return int(np.floor((edge - tile) / step + 1e-6)) + 1


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
