"""Hierarchical attention of a region as HIPT draws it: percentile ranks, averaged over passes that are shifted.

Chen et al. 2022 (arXiv 2206.02647), figures 4 and 5. The attention of a class token is ranked: at the tile level among the
patches of a tile, at the region level among the tiles of a region; so a map says which places matter more than others, not how much.
Each pass sees the region shifted by some pixels, which softens the edges of the tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True)
class ScoreMap:
    """Scores between 0 and 1, float32 (heads, rows, columns), and how many passes cover each pixel (rows, columns)."""

    scores: np.ndarray
    passes: np.ndarray


def tile_level_map(attention: Sequence[np.ndarray], pixel: int, shift: int) -> ScoreMap:
    """The scores of the tile level.

    Args:
        attention: of each pass, (h, w, heads, h', w'): h x w tiles of h' x w' patches.
        pixel: patches are drawn as squares of as many pixels.
        shift: pixels by which each pass lies further to the right and below than the one before.
    """
    maps = []
    for each in attention:
        ranks = ranks_among(each, axes=2, repeats=pixel**2)
        maps.append(enlarge(tiles_in_place(ranks), pixel))
    return overlapping_mean(maps, shift)


def region_level_map(attention: Sequence[np.ndarray], pixel: int, shift: int) -> ScoreMap:
    """The scores of the region level; the arguments are those of `tile_level_map`, attention (heads, h, w) of each pass."""
    return overlapping_mean([enlarge(ranks_among(each, axes=2, repeats=pixel**2), pixel) for each in attention], shift)


def factorised(
    region: ScoreMap, tiles: ScoreMap, region_head: int, tile_head: int, tile_weight: float = 2.0
) -> np.ndarray:
    """One head of each level together, float32 (rows, columns) between 0 and 1.

    A mean over the passes of both, of which those of the tile level count `tile_weight` times: 2 in the original's figures,
    1 in its method `get_region_attention_heatmaps`.
    """
    weights = region.passes, tile_weight * tiles.passes
    total = region.scores[region_head] * weights[0] + tiles.scores[tile_head] * weights[1]
    return (total / (weights[0] + weights[1])).astype(np.float32)


def ranks_among(values: np.ndarray, axes: int, repeats: int = 1) -> np.ndarray:
    """The ranks of `values` among those along the last `axes`, over their number, between 0 and 1; ties share their mean.

    Args:
        repeats: as if each value were there as often: what its rank would be after enlarging.
    """
    flat = values.reshape(*values.shape[: values.ndim - axes], -1)
    ranks = (rankdata(flat, axis=-1) - (1 - 1 / repeats) / 2) / flat.shape[-1]
    return ranks.reshape(values.shape)


def tiles_in_place(maps: np.ndarray) -> np.ndarray:
    """Maps of tiles (h, w, heads, h', w') as those of their region (heads, h * h', w * w')."""
    rows, columns, heads, height, width = maps.shape
    return maps.transpose(2, 0, 3, 1, 4).reshape(heads, rows * height, columns * width)


def enlarge(maps: np.ndarray, pixel: int) -> np.ndarray:
    """Each value of the last two axes as a square of `pixel` x `pixel`."""
    return maps.repeat(pixel, axis=-2).repeat(pixel, axis=-1)


def overlapping_mean(maps: Sequence[np.ndarray], shift: int) -> ScoreMap:
    """The mean of maps (heads, rows, columns) of which number k lies `k * shift` further to the right and below."""
    total = np.zeros(maps[0].shape)
    passes = np.zeros(maps[0].shape[1:], np.int64)
    for number, each in enumerate(maps):
        first = number * shift
        total[:, first:, first:] += each[:, : each.shape[1] - first, : each.shape[2] - first]
        passes[first:, first:] += 1
    return ScoreMap((total / passes).astype(np.float32), passes)
