"""The attention of a hierarchy over a whole slide: region after region, each with what lies beside it, on one canvas."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np

from ..errors import SlideError
from ..features.encoder import Encoder
from ..slides.grid import TileGrid
from ..slides.reader import Slide
from .region_attention import RegionAttention, region_attention


@dataclass(frozen=True)
class Drawing:
    """How attention is drawn.

    Attributes:
        region_head, tile_head: of the two levels; None for the mean over the heads.
        pixel: output pixels of the slide that are one of the maps.
        shift: output pixels by which each pass is shifted.
        region_passes, tile_passes: how many of each level are averaged.
    """

    region_head: int | None = None
    tile_head: int | None = None
    pixel: int = 16
    shift: int = 128
    region_passes: int = 4
    tile_passes: int = 2

    @property
    def beyond(self) -> int:
        """Output pixels to the right and below of a region that the shifted passes see."""
        return (max(self.region_passes, self.tile_passes) - 1) * self.shift


@dataclass(frozen=True)
class SlideAttention:
    """Maps over a slide whose first pixel is level 0's (0, 0).

    Attributes:
        maps: "regions", "tiles" and "factorised", float32 (rows, columns) between 0 and 1.
        covered: bool (rows, columns), where there is a region.
        mpp: microns per pixel of the maps.
    """

    maps: dict[str, np.ndarray]
    covered: np.ndarray
    mpp: float


def slide_attention(slide: Slide, grid: TileGrid, encoder: Encoder, drawing: Drawing) -> SlideAttention:
    """The attention of `encoder`, a hierarchy, over the regions of `grid`.

    A region's surroundings are what the slide shows there, white outside of it: unlike the original, which surrounds
    every region with white, so that maps change at their edges.

    Raises SlideError when a region cannot be read.
    """
    per_pixel = grid.extent[0] / grid.size * drawing.pixel, grid.extent[1] / grid.size * drawing.pixel  # of level 0
    shape = [int(np.ceil(edge / each)) for edge, each in zip(reversed(grid.slide_size), reversed(per_pixel))]
    maps = {name: np.zeros(shape, np.float32) for name in ("regions", "tiles", "factorised")}
    covered = np.zeros(shape, bool)
    for corner, found in region_attentions(slide, grid, encoder, drawing):
        left, top = (round(edge / each) for edge, each in zip(corner, per_pixel))
        drawn = found.maps(drawing.region_head, drawing.tile_head)
        place = np.s_[top : top + drawn["tiles"].shape[0], left : left + drawn["tiles"].shape[1]]
        height, width = covered[place].shape  # a region may leave the slide
        for name, part in drawn.items():
            maps[name][place] = part[:height, :width]
        covered[place] = True
    return SlideAttention(maps, covered, grid.effective_mpp[0] * drawing.pixel)


def region_attentions(
    slide: Slide, grid: TileGrid, encoder: Encoder, drawing: Drawing
) -> Iterator[tuple[np.ndarray, RegionAttention]]:
    """The corner of each region, in level-0 pixels (x, y), and its attention."""
    size = grid.size * grid.region
    wider = size + drawing.beyond
    extent = tuple(each * wider / grid.size for each in grid.extent)
    for corner in grid.xy[:: grid.region**2]:
        pixels, valid = slide.read_tiles(corner[None], wider, extent)
        if not valid.all():
            raise SlideError(f"{slide.path} has a region at {tuple(corner.tolist())} that cannot be read")
        yield (
            corner,
            region_attention(
                encoder.hierarchy,
                pixels[0][:size, :size],
                encoder.region_pixels,
                surroundings=pixels[0],
                pixel=drawing.pixel,
                shift=drawing.shift,
                region_passes=drawing.region_passes,
                tile_passes=drawing.tile_passes,
            ),
        )


def paint(picture: np.ndarray, scores: np.ndarray, covered: np.ndarray, *, colormap: str = "coolwarm") -> np.ndarray:
    """`picture` uint8 (h, w, 3), where it is covered grey, and half of it the colour of `scores` (h, w).

    The original leaves the stain under the colours, from which a red score cannot be told.
    """
    colours = matplotlib.colormaps[colormap](scores, bytes=True)[..., :3]
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.where(covered[..., None], cv2.addWeighted(colours, 0.5, grey, 0.5, 0), picture)
