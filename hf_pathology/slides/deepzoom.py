"""Owkin's coordinates: addresses (level, column, row) in the Deep Zoom pyramid of a slide.

Deep Zoom counts levels up from a single pixel: each has twice the edge of the one before, rounded up, and the last is level
0 of the slide. A tile of `size` pixels at (level, column, row) therefore covers size * 2^(last - level) level-0 pixels,
and its corner is (column, row) times that (`openslide.deepzoom` with no overlap and no bounds).
"""

from pathlib import Path

import numpy as np

from ..errors import UserError
from .exchange import foreign_grid
from .foreign import read_npy, write_npy
from .grid import TileGrid
from .reader import Slide


def read_owkin_npy(path: str | Path, slide: Slide, key: str, *, size: int, mpp: float | None = None) -> TileGrid:
    """The grid of Owkin's `coords.npy`, (N, 3) addresses.

    Args:
        key: the slide's key in its cohort.
        size: edge of a Deep Zoom tile in pixels; the file does not say it (Owkin's folder does: `coords_224`).
        mpp: microns per output pixel that was meant; what the tiles have on this slide when None.

    Where a tile leaves the slide, Owkin's is padded with black and `Slide.read` pads with white.
    """
    return deepzoom_grid(path, read_npy(path), slide, key, size=size, mpp=mpp)


def deepzoom_grid(
    path: str | Path, addresses: np.ndarray, slide: Slide, key: str, *, size: int, mpp: float | None = None
) -> TileGrid:
    """The grid of `addresses` (N, 3); see `deepzoom_corners`."""
    corners, edge = deepzoom_corners(path, addresses, size, slide.dimensions)
    return foreign_grid(path, slide, key, corners, size=size, extent=(edge, edge), stride=(edge, edge), mpp=mpp)


def deepzoom_corners(
    path: str | Path, addresses: np.ndarray, size: int, slide_size: tuple[int, int]
) -> tuple[np.ndarray, float]:
    """The corners (N, 2) of `addresses` (N, 3) and the edge of their tiles, in level-0 pixels.

    Raises UserError unless the addresses are whole numbers on one level of the slide.
    """
    if addresses.ndim != 2 or addresses.shape[1] != 3 or not len(addresses):
        raise UserError(f"{path} holds addresses of shape {addresses.shape}: they must be (N, 3), and N at least 1")
    level, last = addresses[0, 0], last_level(slide_size)
    if not np.array_equal(addresses, np.rint(addresses)) or not (addresses[:, 0] == level).all():
        raise UserError(f"{path} holds no Deep Zoom addresses of one level: whole numbers (level, column, row)")
    if not 0 <= level <= last:
        raise UserError(f"{path} is about Deep Zoom level {level:g}, and the slide has the levels 0 to {last}")
    edge = float(size) * 2.0 ** (last - int(level))
    return addresses[:, 1:] * edge, edge


def write_owkin_npy(grid: TileGrid, path: str | Path) -> None:
    """Writes the (N, 3) addresses, int64. Raises UserError when the tiles are not on a Deep Zoom lattice.

    Lost: the tile's size, the resolution, the shares of tissue.
    """
    write_npy(path, deepzoom_addresses(grid.xy, grid.size, grid.extent, grid.slide_size, grid.slide))


def deepzoom_addresses(
    xy: np.ndarray, size: int, extent: tuple[float, float], slide_size: tuple[int, int], name: str
) -> np.ndarray:
    """(level, column, row) of the tiles at `xy`, int64 (N, 3). Raises UserError saying why there is no such address."""
    last = last_level(slide_size)
    halvings = np.log2(np.asarray(extent) / size)
    steps = round(float(halvings[0]))
    if not np.allclose(halvings, steps, atol=1e-9) or not 0 <= steps <= last:
        raise UserError(
            f"{name} has tiles of {extent[0]:g}x{extent[1]:g} level-0 pixels for {size} output pixels, and Deep Zoom has only "
            "ratios of 1, 2, 4, ...: tile at the slide's own mpp times one of these"
        )
    edge = size * 2**steps
    off = np.flatnonzero((xy % edge).any(axis=1))
    if len(off):
        raise UserError(f"{name} has a tile at {xy[off[0]].tolist()}, and Deep Zoom only multiples of {edge}")
    return np.column_stack([np.full(len(xy), last - steps), xy // edge]).astype(np.int64)


def last_level(slide_size: tuple[int, int]) -> int:
    """The number of the Deep Zoom level that has all pixels: how often the longer edge can be halved, rounding up."""
    return (max(slide_size) - 1).bit_length()
