"""From slides to grids on disk: tissue, grid and a picture of both for each slide, made once and found again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..atomic import atomic_path
from ..errors import SlideError, UserError, require_at_least
from .cohort import CohortSlide
from .grid import TileGrid, tile_grid
from .tissue import Tissue, find_tissue


OVERVIEW_EDGE = 1024  # pixels of the longer edge of the pictures
OUTLINE, GRID = (0, 160, 90), (40, 80, 200)  # RGB


@dataclass
class GridOptions:
    """What tiles to cut.

    Attributes:
        mpp: microns per pixel of a tile.
        tile_size: edge of a tile in pixels.
        stride: pixels between neighbouring tiles; the tile size (no overlap) when None.
        min_tissue: share of a tile's area that must be tissue.
    """

    mpp: float
    tile_size: int
    stride: int | None = None
    min_tissue: float = 0.5

    def __post_init__(self) -> None:
        require_at_least(1, tile_size=self.tile_size, stride=self.stride)
        if not 0 < self.mpp < float("inf"):
            raise UserError(f"mpp is {self.mpp}: it must be a positive number of microns per pixel")
        if not 0 <= self.min_tissue <= 1:
            raise UserError(f"min_tissue is {self.min_tissue}: it is a share, between 0 and 1")


def grid_path(folder: str | Path, slide: str) -> Path:
    """Where the grid of the slide with key `slide` lies in a tiling folder."""
    return Path(folder) / "grids" / f"{slide}.safetensors"


def mask_path(folder: str | Path, slide: str) -> Path:
    """Where its tissue mask lies."""
    return Path(folder) / "masks" / f"{slide}.png"


def overview_path(folder: str | Path, slide: str) -> Path:
    """Where the picture with tissue outline and grid lies."""
    return Path(folder) / "overviews" / f"{slide}.jpg"


def tile_cohort(
    slides: Sequence[CohortSlide], folder: str | Path, options: GridOptions
) -> Iterator[tuple[CohortSlide, TileGrid | SlideError]]:
    """Each slide with its grid, or with the error that kept it from having one; the others go on.

    A grid that was made before, with the same options and the same resolution of the slide, is read, not made again.
    """
    for slide in slides:
        try:
            yield slide, tile_slide(slide, folder, options)
        except SlideError as error:
            yield slide, error


def tile_slide(slide: CohortSlide, folder: str | Path, options: GridOptions) -> TileGrid:
    """The grid of one slide, saved with its tissue mask and its picture. Raises SlideError when it can have none."""
    with slide.open() as opened:
        saved = grid_path(folder, slide.key)
        if saved.is_file():
            try:
                grid = TileGrid.load(saved)
            except UserError:
                grid = None  # a damaged file is made again
            pictures = mask_path(folder, slide.key), overview_path(folder, slide.key)
            if grid is not None and _was_made_with(grid, options, opened.mpp) and all(map(Path.is_file, pictures)):
                return grid
        opened.mpp  # refuses a slide without resolution before any work is done  # noqa: B018
        tissue = find_tissue(opened)
        overview, extent = opened.overview(OVERVIEW_EDGE)
        grid = tile_grid(
            opened,
            tissue,
            key=slide.key,
            size=options.tile_size,
            mpp=options.mpp,
            stride=options.stride,
            min_tissue=options.min_tissue,
        )
        tissue.save(mask_path(folder, slide.key))
        save_jpeg(overview_path(folder, slide.key), draw_grid(overview, extent, tissue, grid))
        grid.save(saved)
        return grid


def _was_made_with(grid: TileGrid, options: GridOptions, slide_mpp: tuple[float, float]) -> bool:
    stride = (options.stride or options.tile_size) * options.mpp / slide_mpp[0]
    return (
        (grid.size, grid.mpp, grid.slide_mpp) == (options.tile_size, options.mpp, tuple(slide_mpp))
        and abs(grid.stride[0] - stride) < 1e-6
        and grid.min_tissue == options.min_tissue
    )


def draw_grid(overview: np.ndarray, extent: tuple[float, float], tissue: Tissue, grid: TileGrid) -> np.ndarray:
    """The `overview` (h, w, 3) of a slide, whose pixels have `extent`, with the outline of its tissue and its tiles."""
    picture = overview.copy()
    mask = cv2.resize(tissue.mask.astype(np.uint8), overview.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    tiles = picture.copy()
    for corner in grid.xy:
        first = np.rint(corner / extent).astype(int)
        last = np.rint((corner + grid.extent) / extent).astype(int)
        cv2.rectangle(tiles, first.tolist(), last.tolist(), GRID, 1)
    picture = cv2.addWeighted(tiles, 0.45, picture, 0.55, 0)
    outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(picture, outlines, -1, OUTLINE, 2)


def save_jpeg(path: Path, picture: np.ndarray, quality: int = 88) -> None:
    """Writes an RGB `picture` (h, w, 3) as JPEG, whole or not at all."""
    encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    with atomic_path(path) as partial:
        partial.write_bytes(encoded.tobytes())
