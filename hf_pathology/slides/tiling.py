"""From slides to grids on disk: tissue, grid and a picture of both for each slide, made once and found again."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..atomic import atomic_path, write_json
from ..claims import claimed
from ..errors import SlideError, UserError, require_at_least
from .clam import tissue_by
from .cohort import CohortSlide
from .geojson import class_fractions, read_annotations, read_geojson, write_geojson
from .grid import TileGrid, tile_grid
from .integrity import verified
from .quality import find_artefacts, quality_numbers, quality_picture
from .reader import MPP_TOLERANCE, Slide
from .tissue import Tissue


OPTIONS_FILE = "tiling.json"
FindTissue = Callable[[Slide, str], Tissue]
OVERVIEW_EDGE = 1024  # pixels of the longer edge of the pictures
OUTLINE, GRID = (0, 160, 90), (40, 80, 200)  # RGB


@dataclass
class GridOptions:
    """What tiles to cut.

    Attributes:
        mpp: microns per pixel of a tile; None only for tiles that exist already, and whose resolution nobody knows.
        tile_size: edge of a tile in pixels.
        stride: pixels between neighbouring tiles (regions); no overlap when None.
        min_tissue: share of a tile's (a region's) area that must be tissue.
        mpp_tolerance: share of `mpp` by which the effective one may differ so that tiles fall on the stored ones.
        region: R, for regions of R * R tiles that are kept or dropped whole.
        partial: also tiles that leave the slide at its right and lower edge.
        tissue: how tissue is found: one of `clam.TISSUE_METHODS`, or what `tile_cohort`'s `find` knows.
        masks: folder of corrected tissue outlines, KEY.geojson, for the slides that have one.
        annotations: folder of annotations, KEY.geojson, whose classes are recorded for every tile.
        classes: annotated classes of which tiles are kept; all tiles when None.
        min_class: share of a tile's area that one of the classes must cover.
        icc: convert pixels to sRGB by the slide's colour profile.
        half_scale: decode JPEG at a fraction of its size where that suffices; faster, not the same pixels.
        verify: look at every stored tile under the tissue, leave out what is damaged, and notice later damage (`integrity.py`).
    """

    mpp: float | None
    tile_size: int
    stride: int | None = None
    min_tissue: float = 0.5
    mpp_tolerance: float = MPP_TOLERANCE
    region: int = 1
    partial: bool = False
    tissue: str = "default"
    masks: str | None = None
    annotations: str | None = None
    classes: list[str] | None = None
    min_class: float = 0.5
    icc: bool = False
    half_scale: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, tile_size=self.tile_size, stride=self.stride, region=self.region)
        if self.mpp is not None and not 0 < self.mpp < float("inf"):
            raise UserError(f"mpp is {self.mpp}: it must be a positive number of microns per pixel")
        for name in ("min_tissue", "min_class", "mpp_tolerance"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: it is a share, between 0 and 1")
        for name in ("masks", "annotations"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise UserError(f"{name} is {folder}: it must be a folder of GeoJSON files")
        if self.classes and not self.annotations:
            raise UserError(
                "classes are chosen, but no annotations: pass the folder of GeoJSON files as --annotations"
            )


def save_options(folder: str | Path, options: GridOptions) -> None:
    """Writes down what a tiling folder is made with, so that who uses it later tiles what is missing in the same way."""
    write_json(Path(folder) / OPTIONS_FILE, asdict(options))


def saved_options(folder: str | Path) -> GridOptions | None:
    """What the tiling folder was made with, or None for a folder that nobody has tiled into."""
    path = Path(folder) / OPTIONS_FILE
    if not path.is_file():
        return None
    try:
        return GridOptions(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): tile again with `hf-pathology tile`") from error


def options_of(
    tiles: str | Path | None, mpp: float | None, size: int | None, otherwise: GridOptions | None
) -> GridOptions | None:
    """What the tiling folder `tiles` was made with, or `otherwise` when it is None or nobody has tiled into it.

    Raises UserError when `mpp` or `size` were asked for and are others.
    """
    options = None if tiles is None else saved_options(tiles)
    if options is None:
        return otherwise
    if mpp not in (None, options.mpp) or size not in (None, options.tile_size):
        raise UserError(
            f"{tiles} holds tiles of {options.tile_size} px at {options.mpp} mpp: leave out --mpp and --size, or choose "
            "another folder"
        )
    return options


def grid_path(folder: str | Path, slide: str) -> Path:
    """Where the grid of the slide with key `slide` lies in a tiling folder."""
    return Path(folder) / "grids" / f"{slide}.safetensors"


def mask_path(folder: str | Path, slide: str) -> Path:
    """Where its tissue mask lies."""
    return Path(folder) / "masks" / f"{slide}.png"


def outline_path(folder: str | Path, slide: str) -> Path:
    """Where its tissue outline lies, which can be corrected in QuPath."""
    return Path(folder) / "masks" / f"{slide}.geojson"


def find_outline(folder: str | Path | None, slide: str) -> Path | None:
    """The outlines of the slide in a folder of somebody else's: KEY.geojson, or KEY without its suffix; None if absent."""
    names = (f"{slide}.geojson", Path(slide).with_suffix(".geojson"))
    paths = [] if folder is None else [Path(folder) / name for name in names]
    return next((path for path in paths if path.is_file()), None)


def overview_path(folder: str | Path, slide: str) -> Path:
    """Where the picture with tissue outline and grid lies."""
    return Path(folder) / "overviews" / f"{slide}.jpg"


def quality_path(folder: str | Path, slide: str) -> Path:
    """Where the picture of what is out of focus, written on or folded lies."""
    return Path(folder) / "quality" / f"{slide}.jpg"


def tile_cohort(
    slides: Sequence[CohortSlide], folder: str | Path, options: GridOptions, find: FindTissue = tissue_by
) -> Iterator[tuple[CohortSlide, TileGrid | SlideError]]:
    """Each slide with its grid, or with the error that kept it from having one; the others go on.

    A grid that was made before, with the same options from the same file, is read, not made again; these come first.
    Processes that tile into one folder share the other slides.

    Args:
        find: finds the tissue of a slide by `options.tissue`.
    """
    to_do = []
    for slide in slides:
        found = saved_grid(slide, folder, options)
        if found is None:
            to_do.append(slide)
        else:
            yield slide, found
    for slide, claim in claimed(to_do, folder, lambda slide: slide.key):
        with claim:
            try:
                result = saved_grid(slide, folder, options) or tile_slide(slide, folder, options, find)
            except SlideError as error:
                result = error
        yield slide, result


def tile_slide(slide: CohortSlide, folder: str | Path, options: GridOptions, find: FindTissue = tissue_by) -> TileGrid:
    """The grid of one slide, saved with its tissue mask, its outline and its pictures. Raises SlideError when it can have none."""
    with Slide(slide.path, slide.mpp, icc=options.icc, half_scale=options.half_scale) as opened:
        opened.mpp  # refuses a slide without resolution before any work is done  # noqa: B018
        outline = find_outline(options.masks, slide.key)
        tissue = find(opened, options.tissue) if outline is None else _outlined(outline, opened)
        overview, extent = opened.overview(OVERVIEW_EDGE)
        grid = tile_grid(
            opened,
            tissue,
            key=slide.key,
            size=options.tile_size,
            mpp=options.mpp,
            stride=options.stride,
            min_tissue=options.min_tissue,
            mpp_tolerance=options.mpp_tolerance,
            region=options.region,
            partial=options.partial,
        )
        artefacts = find_artefacts(overview, extent, tissue, mpp=opened.mpp)
        quality = asdict(quality_numbers(overview, artefacts))
        grid = replace(_annotated(grid, options), quality=quality, options=_all_that_decides(slide.key, options))
        if options.verify:
            grid = verified(grid, opened)
        tissue.save(mask_path(folder, slide.key))
        if outline is None:  # else it would overwrite the correction
            write_geojson(outline_path(folder, slide.key), tissue)
        save_picture(overview_path(folder, slide.key), draw_grid(overview, extent, tissue, grid))
        save_picture(quality_path(folder, slide.key), quality_picture(overview, artefacts))
        grid.save(grid_path(folder, slide.key))
        return grid


def saved_grid(slide: CohortSlide, folder: str | Path, options: GridOptions) -> TileGrid | None:
    """The grid that was saved for the slide, if the file and all that decides it are the same as then, else None."""
    if not (grid_path(folder, slide.key).is_file() and slide.path.is_file()):
        return None
    try:
        grid = TileGrid.load(grid_path(folder, slide.key), mapped=True)  # a cohort has gigabytes of corners
    except UserError:
        return None  # a damaged file is made again
    pictures = mask_path(folder, slide.key), overview_path(folder, slide.key)
    same_file = grid.stored is not None and grid.stored.matches(slide.path.stat())
    same_mpp = slide.mpp is None or grid.slide_mpp == (slide.mpp, slide.mpp)
    same_options = grid.options == _all_that_decides(slide.key, options)
    return grid if same_file and same_mpp and same_options and all(map(Path.is_file, pictures)) else None


def _all_that_decides(slide: str, options: GridOptions) -> dict[str, Any]:
    """The options with size and time of the slide's outlines, so that a grid is made again when they were corrected."""
    outlines = [find_outline(folder, slide) for folder in (options.masks, options.annotations)]
    stamps = [[path.stat().st_size, path.stat().st_mtime_ns] for path in outlines if path is not None]
    return {**asdict(options), "outlines": stamps}


def _outlined(outline: Path, slide: Slide) -> Tissue:
    """The tissue that somebody outlined. Raises SlideError when the file is damaged: the other slides are not concerned."""
    try:
        return read_geojson(outline, slide.dimensions)
    except UserError as error:
        raise SlideError(str(error)) from error


def _annotated(grid: TileGrid, options: GridOptions) -> TileGrid:
    """The grid with its classes, and with only the tiles (regions) of the chosen ones."""
    if options.annotations is None:
        return grid
    path = find_outline(options.annotations, grid.slide)
    if path is None:
        raise SlideError(f"{grid.slide} has no annotations: {options.annotations} holds no {grid.slide}.geojson")
    try:
        found = read_annotations(path)
    except UserError as error:
        raise SlideError(str(error)) from error  # of this slide alone
    classes = tuple(options.classes or sorted(found))
    shares = class_fractions(found, classes, grid.slide_size, grid.xy, grid.extent)  # (N, C)
    grid = replace(grid, classes=classes, class_fraction=shares)
    if not options.classes:
        return grid
    together = grid.region**2  # tiles that are kept or dropped together
    kept = (shares.reshape(-1, together, len(classes)).mean(axis=1) >= options.min_class).any(axis=1)
    if not kept.any():
        raise SlideError(f"{grid.slide} has no tile of {', '.join(classes)}: {path} has {', '.join(sorted(found))}")
    return grid.select(np.repeat(kept, together))


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


def save_picture(path: Path, picture: np.ndarray, quality: int = 88) -> None:
    """Writes an RGB `picture` (h, w, 3), whole or not at all: JPEG of that `quality`, or PNG, as the name of `path` says."""
    parameters = [cv2.IMWRITE_JPEG_QUALITY, quality] if path.suffix == ".jpg" else []
    encoded = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), parameters)[1]
    with atomic_path(path) as partial:
        partial.write_bytes(encoded.tobytes())
