"""Scores of tiles painted over a slide, and the picture that shows both side by side."""

from collections.abc import Sequence
from typing import Literal

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.stats import rankdata

from .images import pixels_of
from .style import WIDTH, plot_style


Scaling = Literal["rank", "raw"]
ROUNDING = 0.45  # level-0 pixels by which tiles may miss each other, since each corner is rounded by itself


def draw_heatmap(
    overview: np.ndarray,
    extent: tuple[float, float],
    xy: np.ndarray,
    tile_extent: tuple[float, float],
    scores: np.ndarray,
    *,
    scaling: Scaling = "rank",
    alpha: float = 0.55,
    colormap: str = "coolwarm",
) -> np.ndarray:
    """The `overview` with its tiles coloured by their scores, uint8 (h, w, 3).

    Under the tiles the slide turns grey, so that a colour means a score and never a stain; what is outside the tiles
    is left as it is.

    Args:
        overview: uint8 (h, w, 3), whose first pixel is level 0's (0, 0).
        extent: edge (x, y) of an overview pixel in level-0 pixels.
        xy: (N, 2), top-left corners of the tiles in level-0 pixels.
        tile_extent: edge (x, y) of a tile in level-0 pixels.
        scores: (N,); where tiles overlap, the mean counts.
        scaling: "rank" colours by percentile ranks, "raw" by the scores themselves, from 0 to 1.
        alpha: between 0 and 1, how strongly the colour covers the slide.
        colormap: the name of one of matplotlib's.

    Raises ValueError when there are not as many scores as tiles, or one is not a finite number.
    """
    values = percentile_ranks(scores) if scaling == "rank" else np.asarray(scores, np.float64)
    mean, covered = mean_over_tiles(values, xy, tile_extent, extent, overview.shape[:2])
    colours = matplotlib.colormaps[colormap](mean[covered], bytes=True)[:, :3]  # (pixels, 3)
    grey = cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY)[covered][:, None]
    picture = overview.copy()
    picture[covered] = np.rint(alpha * colours + (1 - alpha) * grey).astype(np.uint8)
    return picture


def percentile_ranks(scores: np.ndarray) -> np.ndarray:
    """The share of scores below each, between 0 and 1, float64 (N,); ties and the score itself count half.

    Raises ValueError when a score is not a finite number.
    """
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} of {len(scores)} scores are not finite numbers")
    return (rankdata(scores) - 0.5) / len(scores)


def mean_over_tiles(
    values: np.ndarray,
    xy: np.ndarray,
    tile_extent: tuple[float, float],
    extent: tuple[float, float],
    shape: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel the mean of the tiles on it, float64 (h, w), and whether there is any, bool (h, w).

    Each tile is written as four corners of a second difference, whose double running sum fills it: the cost does not
    depend on how large tiles are. Arguments are those of `draw_heatmap`; a tile covers at least one pixel.
    """
    if len(values) != len(xy):
        raise ValueError(f"there are {len(values)} scores for {len(xy)} tiles")
    limits = np.array([shape[1], shape[0]])
    first = np.rint(np.asarray(xy) / extent).astype(np.int64)
    last = np.rint((np.asarray(xy) + tile_extent + ROUNDING) / extent).astype(np.int64)
    last = np.clip(np.maximum(last, first + 1), 0, limits)
    first = np.clip(first, 0, limits)
    corners = [(first[:, 1], first[:, 0], 1), (first[:, 1], last[:, 0], -1)]
    corners += [(last[:, 1], first[:, 0], -1), (last[:, 1], last[:, 0], 1)]

    def fill(weights: np.ndarray) -> np.ndarray:
        difference = np.zeros((shape[0] + 1, shape[1] + 1))
        for row, column, sign in corners:
            np.add.at(difference, (row, column), sign * weights)
        return difference.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]

    count = np.rint(fill(np.ones(len(values))))
    covered = count > 0
    return np.divide(fill(np.asarray(values, np.float64)), count, out=np.zeros(shape), where=covered), covered


@plot_style()
def attention_picture(
    overview: np.ndarray,
    extent: tuple[float, float],
    xy: np.ndarray,
    tile_extent: tuple[float, float],
    scores: np.ndarray,
    *,
    mpp: tuple[float, float],
    colormap: str = "coolwarm",
    name: str = "attention",
) -> np.ndarray:
    """The slide beside the percentile ranks of its tiles' scores, with scale bar and colour bar, uint8 (h', w', 3).

    Args:
        overview, extent, xy, tile_extent, scores, colormap: as for `draw_heatmap`.
        mpp: microns per level-0 pixel (x, y).
        name: of the scores.
    """
    painted = draw_heatmap(overview, extent, xy, tile_extent, scores, colormap=colormap)
    figure, (slide, heatmap) = panels([overview, painted], right_margin=0.11)
    draw_scale_bar(slide, extent[0] * mpp[0])
    place = heatmap.get_position()
    height = min(place.height, 0.25 * figure.get_figwidth() / figure.get_figheight())
    beside = figure.add_axes([place.x1 + 0.015, 0.5 - height / 2, 0.012, height])
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colormap), cax=beside, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["lowest", "median", "highest"])
    bar.ax.set_title(f"rank of\n{name}", fontsize=9, fontweight="normal", pad=14)
    bar.outline.set_visible(False)
    return pixels_of(figure)


def panels(pictures: Sequence[np.ndarray], *, right_margin: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure with `pictures` of one size (h, w, 3) side by side, pixel for pixel, and the axes of each.

    It is as wide as a page, whatever its pixels, so that letters have the same size on every picture.

    Args:
        right_margin: share of the width that stays free.
    """
    height, width = pictures[0].shape[:2]
    step = round(1.012 * width)
    full = round(((len(pictures) - 1) * step + width) / (1 - right_margin))
    figure = Figure(figsize=(WIDTH, WIDTH * height / full), dpi=full / WIDTH)
    axes = []
    for index, picture in enumerate(pictures):
        axes.append(figure.add_axes([index * step / full, 0, width / full, 1]))
        axes[-1].imshow(picture, interpolation="none", aspect="auto")
        axes[-1].set_axis_off()
    return figure, axes


def draw_scale_bar(axes: Axes, um_per_pixel: float) -> None:
    """Draws a bar of a round length, at most a quarter of the picture, into its lower left corner."""
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    length_um = round_length(0.25 * width * um_per_pixel)
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    bar, left, bottom = length_um / um_per_pixel, 0.035 * width, height - 0.035 * width
    line = {"color": "black", "linewidth": 3, "solid_capstyle": "butt"}
    axes.plot([left, left + bar], [bottom, bottom], path_effects=[withStroke(linewidth=6, foreground="white")], **line)
    place = {"ha": "center", "va": "bottom", "fontsize": 10, "color": "black"}
    halo = [withStroke(linewidth=4, foreground="white")]
    axes.text(left + bar / 2, bottom - 0.015 * width, text, path_effects=halo, **place)


def round_length(limit: float) -> float:
    """The largest of ..., 1, 2, 5, 10, 20, 50, ... that is no more than `limit`."""
    power = 10.0 ** np.floor(np.log10(limit))
    return float(max(step for step in (1, 2, 5) if step * power <= limit * (1 + 1e-9)) * power)
