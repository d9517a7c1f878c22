"""Finds where the tissue of a slide is, from an overview and colour alone: no model, nothing to download."""

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ..atomic import atomic_path
from ..errors import SlideError, UserError
from .reader import Slide


SATURATION_RANGE = (15, 25)  # of 255: what Otsu may choose between; CLAM's presets threshold at 8 to 20
PEN_UM = 12.0  # half the width of the thinnest stroke; blue nuclei are narrower
WALL_UM = 3.0  # of the walls between fat cells
GAP_UM = 8.0  # clefts between fibres up to twice this width belong to the tissue
ASSUMED_MPP = 0.5  # for the sizes of specks and holes on slides that declare no resolution


@dataclass(frozen=True)
class Tissue:
    """Where the tissue of a slide is.

    Attributes:
        mask: bool (h, w), True = tissue.
        extent: edge (x, y) of a mask pixel in level-0 pixels; the mask starts at level 0's (0, 0).
    """

    mask: np.ndarray
    extent: tuple[float, float]

    def save(self, path: str | Path) -> None:
        """Writes the mask as an 8-bit grey PNG (255 = tissue) with the extent in a text chunk, atomically."""
        text = PngImagePlugin.PngInfo()
        text.add_text("extent", json.dumps([float(edge) for edge in self.extent]))
        with atomic_path(path) as partial:
            Image.fromarray(self.mask.astype(np.uint8) * 255).save(partial, format="PNG", pnginfo=text)

    @classmethod
    def load(cls, path: str | Path) -> "Tissue":
        """The tissue saved at `path`. Raises UserError when it is missing, damaged or has no extent."""
        try:
            with Image.open(path) as image:
                image.load()
                x, y = json.loads(image.info["extent"])
                return cls(np.asarray(image.convert("L")) > 127, (float(x), float(y)))
        except (OSError, UnidentifiedImageError, KeyError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} is no saved tissue mask ({error!r}): delete it and make it again") from error


def find_tissue(
    slide: Slide, *, max_edge: int = 2048, min_piece_um: float = 100.0, max_hole_um: float = 100.0
) -> Tissue:
    """The tissue of an H&E slide, without glass and pen marks; a blank slide has none.

    Args:
        max_edge: longer edge in pixels of the overview that is looked at, and of the mask.
        min_piece_um: smaller pieces are dropped; microns, the edge of a square of the same area.
        max_hole_um: holes up to this size (lumens, fat cells) count as tissue; microns, measured likewise.

    Tissue is what is more saturated than glass: Otsu's threshold on the median-filtered saturation (as in CLAM,
    doi:10.1038/s41551-020-00682-w), kept within a fixed range, since Otsu splits noise on a blank slide and the tissue
    itself on a full one. The walls between fat cells, which that filter removes, are found as nets without it, on
    overviews of up to some 4 um per pixel. On a slide without mpp the microns are those of a scan at 0.5 mpp. Raises
    SlideError when the slide cannot be read.
    """
    image, extent = slide.overview(max_edge)  # uint8 (h, w, 3)
    um_per_pixel = _um_per_pixel(slide, extent)
    blend = max(1, round(WALL_UM / um_per_pixel))
    white = whiten_glass(image)
    walls = hsv_saturation(cv2.blur(white, (blend, blend)))  # uint8 (h, w)
    saturation = hsv_saturation(cv2.medianBlur(white, 5))
    pen = find_pen(cv2.medianBlur(np.ascontiguousarray(image), 5), um_per_pixel)
    threshold = saturation_threshold(saturation[~pen])
    net = remove_small_pieces(walls > threshold, (min_piece_um / um_per_pixel) ** 2)
    mask = ((saturation > threshold) | net) & ~pen
    gap = max(1.0, GAP_UM / um_per_pixel)
    mask = ~grow(~grow(mask, gap), gap)
    mask = fill_small_holes(mask, (max_hole_um / um_per_pixel) ** 2) & ~pen
    return Tissue(remove_small_pieces(mask, (min_piece_um / um_per_pixel) ** 2), (float(extent[0]), float(extent[1])))


def find_pen(image: np.ndarray, um_per_pixel: float) -> np.ndarray:
    """Where `image` (uint8 RGB (h, w, 3)) shows strokes of red, green, blue or black ink, bool (h, w).

    Ink differs from haematoxylin and eosin (hues of 125 to 176 of OpenCV's 180) by its hue, and black ink from dark
    nuclei by having none. What is thinner than a stroke is left alone: blue nuclei, erythrocytes and pigment.
    """
    blend = max(1, round(PEN_UM / um_per_pixel))  # nuclei, blue or under ink, blend into what is around them
    hue, saturation, value = cv2.split(cv2.cvtColor(cv2.blur(image, (blend, blend)), cv2.COLOR_RGB2HSV))
    chroma = cv2.multiply(saturation, value, scale=1 / 255)
    red = ((hue >= 176) | (hue <= 5)) & (saturation >= 165) & (value >= 60)
    green = (hue >= 35) & (hue <= 95) & (saturation >= 70)
    blue = (hue > 95) & (hue <= 122) & (saturation >= 100)
    black = (value <= 75) & (chroma <= 28)
    half_width = max(2.0, PEN_UM / um_per_pixel)
    core = ~grow(~(red | green | blue | black), half_width)
    return grow(core, 1.2 * half_width + 3)  # and over the blurred rim, whose paler colour is not ink's


def stain_saturation(image: np.ndarray) -> np.ndarray:
    """HSV saturation of `image` (uint8 RGB (h, w, 3)) after its glass was made white, uint8 (h, w)."""
    return hsv_saturation(whiten_glass(image))


def hsv_saturation(image: np.ndarray) -> np.ndarray:
    """HSV saturation of `image` (uint8 RGB (h, w, 3)), uint8 (h, w)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1]


def whiten_glass(image: np.ndarray) -> np.ndarray:
    """`image` (uint8 RGB (h, w, 3)) with its channels scaled so that its glass is white, or as it is where it has none."""
    glass = glass_colour(image)
    if glass is None:
        return np.ascontiguousarray(image)
    table = np.clip(np.arange(256)[:, None] * (245 / glass), 0, 255).astype(np.uint8)  # (256, 3)
    return cv2.LUT(image, table[:, None])


def glass_colour(image: np.ndarray) -> np.ndarray | None:
    """The median colour of what is bright and pale in `image` (uint8 RGB (h, w, 3)), float (3,); None when under 1 % is."""
    sample = image[::4, ::4]
    hsv = cv2.cvtColor(sample, cv2.COLOR_RGB2HSV)
    glass = sample[(hsv[..., 1] < 50) & (hsv[..., 2] > 190)]
    return np.median(glass, axis=0) if len(glass) >= 0.01 * hsv[..., 0].size else None


def saturation_threshold(saturation: np.ndarray) -> float:
    """Otsu's threshold of the values `saturation` (uint8, any shape), kept within `SATURATION_RANGE`."""
    if saturation.size == 0:
        return SATURATION_RANGE[1]
    otsu, _ = cv2.threshold(saturation.reshape(-1, 1), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return float(np.clip(otsu, *SATURATION_RANGE))


def grow(mask: np.ndarray, radius: float) -> np.ndarray:
    """What lies within `radius` pixels of `mask`, bool like it. The outside of the image is neither in nor out."""
    if not mask.any():
        return mask
    if radius < 6:  # up to where a kernel is faster than distances
        y, x = np.mgrid[-int(radius) : int(radius) + 1, -int(radius) : int(radius) + 1]
        return cv2.dilate(mask.astype(np.uint8), (np.hypot(x, y) <= radius).astype(np.uint8)) > 0
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5) <= radius


def remove_small_pieces(mask: np.ndarray, area: float) -> np.ndarray:
    """`mask` without its connected pieces of fewer than `area` pixels."""
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= area
    large[0] = False  # label 0 is what is not in the mask
    return large[pieces]


def fill_small_holes(mask: np.ndarray, area: float) -> np.ndarray:
    """`mask` with its enclosed holes of fewer than `area` pixels filled; what touches the border is no hole."""
    _, holes, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    small = stats[:, cv2.CC_STAT_AREA] < area
    left, top, width, height = stats[:, : cv2.CC_STAT_HEIGHT + 1].T
    small &= (left > 0) & (top > 0) & (left + width < mask.shape[1]) & (top + height < mask.shape[0])
    small[0] = False
    return mask | small[holes]


def intersection_over_union(found: Tissue, truth: Tissue) -> float:
    """The overlap of two masks of one slide, between 0 and 1, on the pixels of `found`; 1 when both are empty."""
    rows = (np.arange(found.mask.shape[0]) + 0.5) * found.extent[1] / truth.extent[1]
    columns = (np.arange(found.mask.shape[1]) + 0.5) * found.extent[0] / truth.extent[0]
    rows = np.minimum(rows.astype(int), truth.mask.shape[0] - 1)
    columns = np.minimum(columns.astype(int), truth.mask.shape[1] - 1)
    expected = truth.mask[np.ix_(rows, columns)]
    union = np.count_nonzero(found.mask | expected)
    return np.count_nonzero(found.mask & expected) / union if union else 1.0


def _um_per_pixel(slide: Slide, extent: tuple[float, float]) -> float:
    """Microns per overview pixel, the geometric mean of both axes."""
    try:
        mpp = slide.mpp
    except SlideError:
        mpp = (ASSUMED_MPP, ASSUMED_MPP)
    return float(np.sqrt(mpp[0] * extent[0] * mpp[1] * extent[1]))
