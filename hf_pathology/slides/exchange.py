"""Coordinates of tiles from and for other programs: CLAM and TRIDENT (.h5), INTELLIGENS (.npy beside the slide).

Owkin's addresses are in `deepzoom.py`, those of hs2p and slide2vec in `hs2p.py`; `docs/formats.md` has a table of all of
them. What a file does not say, its resolution above all, comes from the open slide. A grid of another program has no
options, and NaN for the share of tissue where the file does not state it.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .foreign import naming_read_errors, positive, read_h5, read_npy, write_h5, write_npy
from .grid import TileGrid
from .reader import Slide


INTELLIGENS_EXTENT = 256  # level-0 pixels that INTELLIGENS reads at every corner, whatever the resolution
MAX_SIZE = 16384  # output pixels; HIPT's regions, the largest tiles in use, have 4096


def read_clam_h5(
    path: str | Path, slide: Slide, key: str, *, size: int | None = None, mpp: float | None = None
) -> TileGrid:
    """The grid of a file of coordinates that CLAM or TRIDENT wrote.

    Args:
        key: the slide's key in its cohort.
        size: edge of a tile in output pixels; what the file calls `patch_size` when None.
        mpp: microns per output pixel that the tiles are meant to have. When None, TRIDENT's magnification says it
            (20x is 0.5), and for CLAM, which knows none, it is what the tiles have on this slide.

    Raises UserError when the file is damaged, lacks an attribute, or was made from another slide.
    """
    arrays, attributes = read_h5(path, ["coords"])
    if "coords" not in arrays:
        raise UserError(f"{path} has no dataset 'coords': it is not a file of coordinates of CLAM or TRIDENT")
    return h5_grid(path, arrays["coords"], attributes, slide, key, size=size, mpp=mpp)


def h5_grid(
    path: str | Path,
    coords: np.ndarray,
    attributes: dict[str, Any],
    slide: Slide,
    key: str,
    *,
    size: int | None = None,
    mpp: float | None = None,
) -> TileGrid:
    """The grid of `coords` (N, 2), level-0 pixels, with the attributes that CLAM or TRIDENT keeps beside them."""
    with naming_read_errors(path, "coordinates of CLAM or TRIDENT"):
        edge = positive(path, attributes, "patch_size")
        if "patch_level" in attributes:  # CLAM: the edge in pixels of a level
            scale, stride = clam_downsample(path, attributes, slide), None
        elif "target_magnification" in attributes:  # TRIDENT: the edge in pixels of a magnification
            require_same_slide(path, slide, attributes.get("level0_width"), attributes.get("level0_height"))
            target = positive(path, attributes, "target_magnification")
            scale = (positive(path, attributes, "level0_magnification") / target,) * 2
            step = positive(path, {"step": edge - float(attributes.get("overlap", 0))}, "step")
            stride = (step * scale[0], step * scale[1])
            mpp = mpp or 10 / target * edge / (size or edge)
        else:
            raise UserError(f"{path} says neither patch_level (CLAM) nor target_magnification (TRIDENT) of its tiles")
    extent = (edge * scale[0], edge * scale[1])
    return foreign_grid(path, slide, key, coords, size=size or edge, extent=extent, stride=stride, mpp=mpp)


def clam_downsample(path: str | Path, attributes: dict[str, Any], slide: Slide) -> tuple[float, float]:
    """Level-0 pixels per pixel (x, y) of the level whose pixels CLAM read; from the slide where the file lacks them."""
    level, sizes = int(attributes["patch_level"]), slide.handle.level_dimensions
    if not 0 <= level < len(sizes):
        raise UserError(f"{path} is about level {level}, and {slide.path} has {len(sizes)} levels: pass its own slide")
    require_same_slide(path, slide, *attributes.get("level_dim", sizes[level]), size=sizes[level])
    if "downsample" not in attributes:
        return slide.dimensions[0] / sizes[level][0], slide.dimensions[1] / sizes[level][1]
    x, y = np.broadcast_to(attributes["downsample"], 2)
    return positive(path, {"downsample": x}, "downsample"), positive(path, {"downsample": y}, "downsample")


def require_same_slide(
    path: str | Path, slide: Slide, width: int | None, height: int | None, size: tuple[int, int] | None = None
) -> None:
    """Raises UserError when the file states other dimensions than the slide has; what it does not state is passed over."""
    size = size or slide.dimensions
    if width is not None and height is not None and (int(width), int(height)) != tuple(size):
        raise UserError(
            f"{path} was made from a slide of {width}x{height} pixels, and {slide.path} has {size[0]}x{size[1]}: "
            "pass the slide it belongs to"
        )


def write_clam_h5(grid: TileGrid, path: str | Path) -> None:
    """Writes the corners with the attributes of CLAM and of TRIDENT, in agreement: both read the same pixels of level 0.

    Lost: the size in output pixels (`patch_size` is the edge in level-0 pixels, rounded) and the shares of tissue.
    """
    edge = round(square_edge(grid.extent, grid.slide))
    whole = {
        "patch_level": 0,
        "downsample": (1.0, 1.0),
        "downsampled_level_dim": grid.slide_size,
        "level_dim": grid.slide_size,
        "save_path": str(Path(path).parent),
    }
    shared = trident_attributes(grid.slide, edge, (edge, edge), grid.slide_mpp[0], grid.slide_size, grid.stride, path)
    write_h5(path, {"coords": grid.xy}, {"coords": shared | whole})


def write_trident_h5(grid: TileGrid, path: str | Path) -> None:
    """Writes the corners with TRIDENT's attributes: tiles of `grid.size` pixels at the magnification that is 10 / mpp.

    Lost: the shares of tissue, the slide's resolution, and overlaps finer than an output pixel.
    """
    attributes = trident_attributes(grid.slide, grid.size, grid.extent, grid.mpp, grid.slide_size, grid.stride, path)
    write_h5(path, {"coords": grid.xy}, {"coords": attributes})


def trident_attributes(
    slide: str,
    size: int,
    extent: tuple[float, float],
    mpp: float,
    slide_size: tuple[int, int],
    stride: tuple[float, float],
    path: str | Path,
) -> dict[str, Any]:
    """What TRIDENT keeps beside coordinates; its two magnifications are such that their ratio is the extent's exactly."""
    edge = square_edge(extent, slide)
    return {
        "patch_size": size,
        "patch_size_level0": round(edge),
        "level0_magnification": 10 / mpp * edge / size,
        "target_magnification": 10 / mpp,
        "overlap": round(size - stride[0] * size / edge),
        "name": Path(slide).stem,
        "savetodir": str(Path(path).parent),
        "level0_width": slide_size[0],
        "level0_height": slide_size[1],
    }


def read_intelligens_npy(
    path: str | Path, slide: Slide, key: str, *, size: int = INTELLIGENS_EXTENT, mpp: float | None = None
) -> TileGrid:
    """The grid of the (N, 2) corners that INTELLIGENS keeps beside a slide; its tiles are 256 pixels of level 0."""
    extent = (float(INTELLIGENS_EXTENT),) * 2
    return foreign_grid(path, slide, key, read_npy(path), size=size, extent=extent, mpp=mpp)


def write_intelligens_npy(grid: TileGrid, path: str | Path) -> None:
    """Writes the (N, 2) corners. Raises UserError when the tiles are not those that INTELLIGENS would read there.

    Lost: everything else. INTELLIGENS looks for `slide.npy` beside `slide.svs`.
    """
    if max(abs(edge - INTELLIGENS_EXTENT) for edge in grid.extent) > 0.5:
        raise UserError(
            f"{path} cannot be written: INTELLIGENS reads {INTELLIGENS_EXTENT} pixels of level 0 at each corner, and the "
            f"tiles of {grid.slide} have {grid.extent[0]:g}: tile with size {INTELLIGENS_EXTENT}, mpp {grid.slide_mpp[0]:g}"
        )
    write_npy(path, grid.xy)


def foreign_grid(
    path: str | Path,
    slide: Slide,
    key: str,
    corners: np.ndarray,
    *,
    size: float,
    extent: tuple[float, float],
    stride: tuple[float, float] | None = None,
    mpp: float | None = None,
    slide_mpp: tuple[float, float] | None = None,
    tissue_fraction: np.ndarray | None = None,
) -> TileGrid:
    """The grid of `corners` (N, 2), checked against the slide; what is None is found out or stays unknown.

    All grids of other programs are made here. Raises UserError for corners or sizes that cannot be meant.
    """
    xy = checked_corners(path, corners, slide.dimensions)
    # A tile may leave the slide at its border, but most of it lies on the slide.
    if not 1 <= size <= MAX_SIZE or max(extent) > 2 * max(slide.dimensions):
        raise UserError(
            f"{path} has tiles of {size:g} px, {extent[0]:g} level-0 pixels on a slide of {slide.dimensions}: is it damaged?"
        )
    size, slide_mpp = round(size), slide_mpp or slide.mpp
    return TileGrid(
        slide=key,
        size=size,
        mpp=mpp or (extent[0] * slide_mpp[0] + extent[1] * slide_mpp[1]) / 2 / size,
        slide_mpp=slide_mpp,
        extent=extent,
        stride=stride or usual_stride(xy, extent),
        slide_size=slide.dimensions,
        xy=xy,
        tissue_fraction=np.full(len(xy), np.nan, np.float32) if tissue_fraction is None else tissue_fraction,
        icc=slide.icc,
        half_scale=slide.half_scale,
    )


def checked_corners(path: str | Path, corners: np.ndarray, slide_size: tuple[int, int]) -> np.ndarray:
    """The corners (N, 2) rounded to level-0 pixels, int64. Raises UserError unless all lie on the slide."""
    if corners.ndim != 2 or corners.shape[1] != 2 or corners.dtype.kind not in "iuf" or not len(corners):
        raise UserError(f"{path} holds coordinates of shape {corners.shape}: they must be (N, 2), and N at least 1")
    inside = (corners >= 0) & (corners < slide_size)  # False for NaN
    if not inside.all():
        row = int(np.argmin(inside.all(axis=1)))
        raise UserError(f"{path} has a tile at {corners[row].tolist()}, outside the slide of {slide_size} pixels")
    return np.rint(corners).astype(np.int64)


def usual_stride(xy: np.ndarray, extent: tuple[float, float]) -> tuple[float, float]:
    """The distance (x, y) between neighbours that occurs most often, up to rounding; the extent where there is none.

    Other programs start a lattice at the border of each piece of tissue, so the distance has to be found within a row.
    """
    strides = []
    for along, across, edge in ((xy[:, 0], xy[:, 1], extent[0]), (xy[:, 1], xy[:, 0], extent[1])):
        order = np.lexsort((along, across))
        gaps = np.diff(along[order])[np.diff(across[order]) == 0]
        values, counts = np.unique(gaps[gaps > 0], return_counts=True)
        usual = values[counts.argmax()] if len(values) else edge
        near = gaps[abs(gaps - usual) <= 1]
        strides.append(float(near.mean()) if len(near) and abs(usual - edge) >= 1 else float(edge))
    return strides[0], strides[1]


def square_edge(extent: tuple[float, float], name: str) -> float:
    """The edge of a square tile in level-0 pixels. Raises UserError when width and height differ by half a pixel."""
    if abs(extent[0] - extent[1]) > 0.5:
        raise UserError(
            f"{name} has tiles of {extent[0]:g}x{extent[1]:g} level-0 pixels: this format knows only squares"
        )
    return (extent[0] + extent[1]) / 2
