"""Tissue, its contours and its tiles as CLAM finds them, and the choice between CLAM's ways and our own.

Written from the published description: Lu et al. (2021), doi:10.1038/s41551-020-00682-w.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import openslide

from ..errors import SlideError, UserError
from .geojson import Polygon, crossings, draw_polygons
from .reader import Slide
from .tissue import Tissue, find_tissue


SEGMENTATION_DOWNSAMPLE = 64  # the level that contours are found on
MAX_PIXELS = 10**8  # of that level
UNIT = 512  # areas are counted in squares of this edge, level-0 pixels
MASK_EDGE = 2048  # of masks made of contours


@dataclass(frozen=True)
class ClamPreset:
    """How CLAM finds contours.

    Attributes:
        saturation: of 255; tissue is more saturated.
        median: edge in pixels of the median filter.
        closing: edge in pixels of the square that gaps are closed with.
        min_area, min_hole: what contours (less their holes) and holes must exceed, in squares of 512 level-0 pixels.
        max_holes: the largest holes of a contour that are kept; others count as tissue.
        otsu: takes Otsu's threshold in the place of `saturation`.
    """

    saturation: int
    median: int
    closing: int
    min_area: int
    min_hole: int
    max_holes: int
    otsu: bool = False


PRESETS = {  # by the names of `tissue_by`; CLAM calls them default, tcga, bwh_resection and bwh_biopsy
    "clam": ClamPreset(saturation=8, median=7, closing=4, min_area=100, min_hole=16, max_holes=8),
    "clam-tcga": ClamPreset(saturation=8, median=7, closing=4, min_area=16, min_hole=4, max_holes=8),
    "clam-resection": ClamPreset(saturation=15, median=11, closing=4, min_area=100, min_hole=16, max_holes=8),
    "clam-biopsy": ClamPreset(saturation=15, median=11, closing=2, min_area=1, min_hole=1, max_holes=2),
    "clam-otsu": ClamPreset(saturation=8, median=7, closing=4, min_area=100, min_hole=16, max_holes=8, otsu=True),
}
TISSUE_METHODS = ("default", *PRESETS)
CONTOUR_TESTS = {  # the points of a tile, in quarters of its edge, and how many of them must lie in the contour
    "four_pt": (((1, 1), (3, 3), (3, 1), (1, 3)), 1),
    "four_pt_hard": (((1, 1), (3, 3), (3, 1), (1, 3)), 4),
    "center": (((2, 2),), 1),
    "basic": (((0, 0),), 1),
}


def tissue_by(slide: Slide, method: str) -> Tissue:
    """The tissue of `slide` as `method`, one of `TISSUE_METHODS`, finds it. Raises UserError for another one."""
    if method == "default":
        return find_tissue(slide)
    if method not in PRESETS:
        raise UserError(f"{method} is no way to find tissue: choose one of {', '.join(TISSUE_METHODS)}")
    return tissue_of_contours(find_contours(slide, PRESETS[method]), slide.dimensions)


def find_contours(slide: Slide, preset: ClamPreset) -> list[Polygon]:
    """The contours of the tissue with their holes, int32 level-0 pixels, in OpenCV's order.

    Raises SlideError when the slide cannot be read, or has no level that is small enough.
    """
    saturation, scale = _read_saturation(slide)
    saturation = cv2.medianBlur(saturation, preset.median)
    kind = cv2.THRESH_BINARY + (cv2.THRESH_OTSU if preset.otsu else 0)
    mask = cv2.threshold(saturation, preset.saturation, 255, kind)[1]
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((preset.closing, preset.closing), np.uint8))
    rings, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    unit = int(UNIT**2 / (scale[0] * scale[1]))
    areas = [cv2.contourArea(ring) for ring in rings]
    holes: dict[int, list[int]] = {}
    parents = tree[0, :, 3].tolist() if rings else []
    for index, parent in enumerate(parents):
        holes.setdefault(parent, []).append(index)

    def at_level_0(index: int) -> np.ndarray:
        return (rings[index][:, 0] * scale).astype(np.int32)

    contours = []
    for index in holes.get(-1, []):
        inner = sorted(holes.get(index, []), key=areas.__getitem__, reverse=True)
        if areas[index] - sum(areas[hole] for hole in inner) > preset.min_area * unit:
            kept = [hole for hole in inner[: preset.max_holes] if areas[hole] > preset.min_hole * unit]
            contours.append(Polygon(at_level_0(index), tuple(map(at_level_0, kept))))
    return contours


def tissue_of_contours(contours: Sequence[Polygon], slide_size: tuple[int, int], max_edge: int = MASK_EDGE) -> Tissue:
    """The area of `contours` as a mask of a slide of `slide_size` (level-0 width and height)."""
    return draw_polygons(contours, slide_size, max_edge)


def clam_grid_corners(
    contours: Sequence[Polygon],
    size: int,
    step: int,
    *,
    slide_size: tuple[int, int],
    contour_test: str = "four_pt",
    padding: bool = True,
) -> np.ndarray:
    """The corners of the tiles that CLAM cuts, int64 (N, 2), contour by contour and column by column.

    Args:
        size: edge of a tile in level-0 pixels.
        step: distance between tiles in level-0 pixels.
        slide_size: width and height of level 0.
        contour_test: a key of `CONTOUR_TESTS`; what lies on the contour lies in it.
        padding: lets tiles reach beyond the slide.

    Each contour has a lattice of its own, which starts at the corner of its bounding box, so tiles of overlapping contours
    may overlap. A tile whose centre lies within a hole is left out. Raises UserError for another `contour_test`.
    """
    if contour_test not in CONTOUR_TESTS:
        raise UserError(f"{contour_test} is no test of CLAM's contours: choose one of {', '.join(CONTOUR_TESTS)}")
    quarters, needed = CONTOUR_TESTS[contour_test]
    corners = [np.empty((0, 2), np.int64)]
    for contour in contours:
        first, stop = contour.outline.min(axis=0), contour.outline.max(axis=0) + 1
        if not padding:
            stop = np.minimum(stop, np.asarray(slide_size) - size + 1)
        columns, rows = np.meshgrid(*(np.arange(a, b, step) for a, b in zip(first, stop)), indexing="ij")
        xy = np.stack([columns.ravel(), rows.ravel()], axis=1).astype(np.int64)
        hits = sum(
            (side_of_polygon(xy + np.multiply(quarter, size // 2 * 0.5), contour.outline) >= 0).astype(int)
            for quarter in quarters
        )
        keep = hits >= needed
        for hole in contour.holes:
            keep &= side_of_polygon(xy + size / 2, hole) <= 0
        corners.append(xy[keep])
    return np.concatenate(corners)


def side_of_polygon(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """1 for each of `points` (N, 2) inside `polygon` (P, 2), 0 on its edge, -1 outside, int8 (N,).

    Exact for corners that are integers and points on quarters of a pixel, as far as 2^20 pixels.
    """
    heights, row = np.unique(points[:, 1], return_inverse=True)
    crossed_row, crossed_x = crossings([polygon], heights)
    # Horizontal edges and tips are not crossed, but are edge: each corner and each level edge is a stretch of its line.
    following = np.roll(polygon, -1, axis=0)
    far = np.where(polygon[:, 1] == following[:, 1], following[:, 0], polygon[:, 0])
    on_line = np.isin(polygon[:, 1], heights)
    stretch = np.sort(np.stack([polygon[:, 0], far]), axis=0)[:, on_line]
    stretch_row = np.searchsorted(heights, polygon[on_line, 1])

    places = np.unique(np.concatenate([points[:, 0], crossed_x, *stretch]))

    def rank(row: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The place of (row, x) in reading order: one exact integer in the place of two numbers."""
        return row * len(places) + np.searchsorted(places, x)

    point = rank(row, points[:, 0])
    crossed, begins, ends = (
        np.sort(rank(*pair))
        for pair in ((crossed_row, crossed_x), (stretch_row, stretch[0]), (stretch_row, stretch[1]))
    )
    before = np.searchsorted(crossed, point)
    crossings_left = before - np.searchsorted(crossed, row * len(places))
    on_edge = np.searchsorted(crossed, point, "right") > before
    on_edge |= np.searchsorted(begins, point, "right") > np.searchsorted(ends, point)
    return np.where(on_edge, 0, np.where(crossings_left % 2 == 1, 1, -1)).astype(np.int8)


def _read_saturation(slide: Slide) -> tuple[np.ndarray, tuple[float, float]]:
    """HSV saturation of the level that contours are found on, uint8 (h, w), and its level-0 pixels per pixel, (x, y)."""
    handle = slide.handle
    level = handle.get_best_level_for_downsample(SEGMENTATION_DOWNSAMPLE) if handle.level_count > 1 else 0
    width, height = handle.level_dimensions[level]
    if width * height > MAX_PIXELS:
        raise SlideError(
            f"{slide.path} has no level small enough for CLAM's contours ({width}x{height} px is the nearest): "
            "choose the default way to find tissue"
        )
    try:
        pixels = np.asarray(handle.read_region((0, 0), level, (width, height)))[
            ..., :3
        ]  # what was not scanned is black
    except openslide.OpenSlideError as error:
        slide.close()  # OpenSlide refuses every further read on a handle that failed once
        raise SlideError(f"{slide.path} cannot be read at level {level} ({error})") from error
    saturation = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV)[..., 1]
    return saturation, (slide.dimensions[0] / width, slide.dimensions[1] / height)
