"""What a hierarchy looks at in a region and over a slide: passes over shifted regions, scored by `region_scores.py`."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .region_scores import ScoreMap, factorised, region_level_map, tile_level_map


WHITE = 255


@dataclass(frozen=True)
class RegionAttention:
    """The scores of both levels of a region, drawn with squares of `pixel` x `pixel` output pixels.

    Attributes:
        regions: of the region level, a map for each of its heads.
        tiles: of the tile level.
        pixel: how many pixels of the region are one of the maps.
    """

    regions: ScoreMap
    tiles: ScoreMap
    pixel: int

    def maps(self, region_head: int | None, tile_head: int | None) -> dict[str, np.ndarray]:
        """One head of each level, None for the mean over all, and both together: float32 (rows, columns) from 0 to 1.

        "regions", "tiles" and "factorised".
        """
        regions, tiles = one_head(self.regions, region_head), one_head(self.tiles, tile_head)
        together = factorised(regions, tiles, 0, 0)
        return {"regions": regions.scores[0], "tiles": tiles.scores[0], "factorised": together}


def one_head(level: ScoreMap, head: int | None) -> ScoreMap:
    """The map with this head alone, or with the mean over the heads."""
    scores = level.scores.mean(axis=0) if head is None else level.scores[head]
    return ScoreMap(scores[None], level.passes)


def region_attention(
    model: torch.nn.Module,
    region: np.ndarray,
    to_pixels: Callable[[np.ndarray], torch.Tensor],
    *,
    surroundings: np.ndarray | None = None,
    pixel: int = 16,
    shift: int = 128,
    region_passes: int = 4,
    tile_passes: int = 2,
) -> RegionAttention:
    """The scores of a region, as HIPT draws them by default: four passes of the region level, two of the tile level.

    Args:
        model: a `HiptModel`.
        region: uint8 (H, W, 3), edges multiples of the model's tiles.
        to_pixels: makes the model's input (1, 3, H, W) of uint8 pixels (H, W, 3).
        surroundings: the region with what lies to the right and below of it, uint8, the region's corner first: what the
            shifted passes see there. White where it ends, and where it is None, as in the original.
        pixel: pixels of the region that are one of the maps; a divisor of the patches' size.
        shift: pixels by which each pass is shifted to the right and below.

    Raises ValueError when `pixel` does not divide the patches and the shift.
    """
    size, patch = model.config.tile_size, model.config.tile_config.patch_size
    if patch % pixel or shift % pixel:
        raise ValueError(f"pixel is {pixel}: it must divide the edge of a patch, {patch}, and the shift, {shift}")
    height, width = region.shape[:2]
    beyond = (max(region_passes, tile_passes) - 1) * shift
    around = region if surroundings is None else surroundings[: height + beyond, : width + beyond]
    wider = np.full((height + beyond, width + beyond, 3), WHITE, np.uint8)
    wider[: around.shape[0], : around.shape[1]] = around
    of_tiles, of_regions = [], []
    for number in range(max(region_passes, tile_passes)):
        first = number * shift
        seen = model.attention(to_pixels(wider[first : first + height, first : first + width]))
        if number < tile_passes:
            of_tiles.append(seen.tiles[0].float().cpu().numpy())
        if number < region_passes:
            of_regions.append(seen.regions[0].float().cpu().numpy())
    return RegionAttention(
        region_level_map(of_regions, size // pixel, shift // pixel),
        tile_level_map(of_tiles, patch // pixel, shift // pixel),
        pixel,
    )
