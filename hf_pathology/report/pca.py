"""Patch features as colours: what looks the same to an encoder gets the same colour."""

from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA

from ..errors import SlideError
from ..features.encoder import Encoder
from ..slides.grid import TileGrid
from ..slides.reader import Slide
from .attention import patch_features
from .heatmap import mean_over_tiles


PERCENTILES = (2.0, 98.0)  # of a component, which become 0 and 255: outliers do not pale the others


@dataclass(frozen=True)
class SlidePatches:
    """The patches of neighbouring tiles of a slide, and the part of the slide that they cover.

    Attributes:
        overview: uint8 (h, w, 3), the part of the slide.
        extent: edge (x, y) of its pixels in level-0 pixels.
        xy: float64 (N, 2), top-left corners of the patches, level-0 pixels from the corner of the overview.
        patch_extent: edge (x, y) of a patch in level-0 pixels.
        features: float32 (N, D).
    """

    overview: np.ndarray
    extent: tuple[float, float]
    xy: np.ndarray
    patch_extent: tuple[float, float]
    features: np.ndarray


@dataclass(frozen=True)
class PatchColours:
    """The rule that makes a colour of a patch's features.

    Attributes:
        pca: of three components.
        low, high: float (3,), the projections that become 0 and 255.
    """

    pca: PCA
    low: np.ndarray
    high: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The colours, uint8 (N, 3), of `features` (N, D)."""
        scaled = (self.pca.transform(features) - self.low) / np.maximum(self.high - self.low, 1e-12)
        return np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)


def fit_colours(features: np.ndarray, *, seed: int, max_patches: int = 20_000) -> PatchColours:
    """The colours by the three main components of `features` (N, D), or of `max_patches` of them drawn with `seed`.

    The components are exact and their signs fixed (the largest weight of each is positive), so the same features have
    the same colours on every machine. Raises ValueError for fewer than four patches or three dimensions.
    """
    if len(features) < 4 or features.shape[1] < 3:
        raise ValueError(f"three components need 4 patches of 3 dimensions or more, not {features.shape}")
    if len(features) > max_patches:
        features = features[np.random.default_rng(seed).choice(len(features), max_patches, replace=False)]
    pca = PCA(3, svd_solver="covariance_eigh").fit(features.astype(np.float64))
    low, high = np.percentile(pca.transform(features), PERCENTILES, axis=0)
    return PatchColours(pca, low, high)


def read_patches(
    grid: TileGrid,
    slide: Slide,
    encoder: Encoder,
    *,
    max_tiles: int = 1500,
    max_edge: int = 1024,
    batch_size: int = 64,
) -> SlidePatches:
    """The patches of the `max_tiles` tiles nearest to the middle of the tissue; all tiles of a small slide.

    Args:
        max_edge: longer edge in pixels of the picture of the part of the slide that they cover.

    Raises SlideError when no tile can be read.
    """
    distance = np.linalg.norm(grid.xy - np.median(grid.xy, axis=0), axis=1)
    xy = grid.xy[np.sort(distance.argsort(kind="stable")[:max_tiles])]
    corners, features = [], []
    for start in range(0, len(xy), batch_size):
        batch = xy[start : start + batch_size]
        tiles, valid = slide.read_tiles(batch, grid.size, grid.extent)
        features.append(patch_features(encoder, tiles)[valid])
        corners.append(batch[valid])
    features, corners = np.concatenate(features), np.concatenate(corners)  # (N, h', w', D), (N, 2)
    if len(features) == 0:
        raise SlideError(f"{slide.path} has no tile that can be read: the file is damaged, get it again")
    rows, columns = features.shape[1:3]
    patch_extent = (grid.extent[0] / columns, grid.extent[1] / rows)
    offsets = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1) * patch_extent  # (h', w', 2)
    overview, origin, extent = read_part(slide, corners, grid.extent, max_edge)
    places = (corners - origin)[:, None, None] + offsets  # (N, h', w', 2)
    return SlidePatches(
        overview, extent, places.reshape(-1, 2), patch_extent, features.reshape(-1, features.shape[-1])
    )


def read_part(
    slide: Slide, xy: np.ndarray, tile_extent: tuple[float, float], max_edge: int
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """The part of the slide that the tiles at `xy` (N, 2) cover, uint8 (h, w, 3), its corner, and its pixel's extent."""
    first, last = xy.min(axis=0), xy.max(axis=0) + tile_extent
    microns = (last - first) * slide.mpp
    mpp = max(microns.max() / max_edge, *slide.mpp)
    size = tuple(max(1, int(np.ceil(edge / mpp - 1e-6))) for edge in microns)
    return slide.read(tuple(first.tolist()), size, mpp), first, slide.extent(1, mpp)


def draw_patches(patches: SlidePatches, colours: PatchColours) -> np.ndarray:
    """The part of the slide with each patch painted in its colour, uint8 (h, w, 3); the rest is white."""
    painted = colours(patches.features)  # (N, 3)
    picture = np.full_like(patches.overview, 255)
    for channel in range(3):
        mean, covered = mean_over_tiles(
            painted[:, channel], patches.xy, patches.patch_extent, patches.extent, picture.shape[:2]
        )
        picture[covered, channel] = np.rint(mean[covered]).astype(np.uint8)
    return picture
