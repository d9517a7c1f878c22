"""The part of a report that shows what an encoder sees: the attention of its class token, and its patches as colours."""

from collections.abc import Sequence

import cv2
import numpy as np

from ..features.encoder import Encoder
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from .attention import attention_maps, draw_attention
from .heatmap import draw_scale_bar, panels
from .images import jpeg_uri, pixels_of
from .page import Picture, Section
from .pca import SlidePatches, draw_patches, fit_colours, read_patches
from .style import plot_style


SHOWN_EDGE = 144  # pixels of a tile on the page
GAP = 6
PICTURE_EDGE = 720  # pixels of the longer edge of a slide


def encoder_section(
    encoder: Encoder, slides: Sequence[tuple[CohortSlide, TileGrid]], *, seed: int = 0, max_tiles: int = 1500
) -> Section:
    """Tiles under the encoder's attention, and patches as colours, for the first slide of each class.

    Args:
        encoder: a ViT loaded with `attention="eager"`.
        slides: with their grids, of which the first with tiles in the middle of each class are shown.
        seed: of the choice of tiles.
        max_tiles: of a slide whose patches become colours; those around the middle of the tissue.

    Raises UserError when the encoder returns no attention, SlideError when a slide cannot be read.
    """
    examples = first_of_each_class(slides)
    figures = [attention_figure(encoder, slide, grid, seed=seed) for slide, grid in examples]
    patches = []
    for slide, grid in examples:
        with slide.open() as opened:
            patches.append(read_patches(grid, opened, encoder, max_tiles=max_tiles, max_edge=PICTURE_EDGE))
    colours = fit_colours(np.concatenate([part.features for part in patches]), seed=seed)
    for (slide, grid), part in zip(examples, patches):
        picture = patches_picture(part, draw_patches(part, colours), grid.slide_mpp)
        caption = "The slide, and its patches coloured by the three main components of their features."
        figures.append(Picture(jpeg_uri(picture), caption, title=name_of(slide)))
    text = (
        "Attention: for each tile, drawn at random, how strongly the class token of the last layer looks at each patch "
        "(mean of the heads; bright is most, on a scale of the tile's own).\n\n"
        "Patches as colours: the components were fitted to the slides shown, together, so the same colour "
        "means similar features on all of them. The colours themselves have no meaning."
    )
    return Section("What the encoder sees", text, figures)


def first_of_each_class(slides: Sequence[tuple[CohortSlide, TileGrid]]) -> list[tuple[CohortSlide, TileGrid]]:
    """The first slide of each label, in the order in which labels appear."""
    first: dict[str | None, tuple[CohortSlide, TileGrid]] = {}
    for slide, grid in slides:
        first.setdefault(slide.label, (slide, grid))
    return list(first.values())


def attention_figure(encoder: Encoder, slide: CohortSlide, grid: TileGrid, *, seed: int, columns: int = 7) -> Picture:
    """A row of tiles of the slide, drawn with `seed`, above the same tiles under the encoder's attention."""
    drawn = np.random.default_rng(seed).choice(len(grid), min(columns, len(grid)), replace=False)
    with grid.open(slide.path) as opened:
        tiles, valid = opened.read_tiles(grid.xy[np.sort(drawn)], grid.size, grid.extent)
    tiles = tiles[valid]
    maps = attention_maps(encoder, tiles).mean(axis=1)  # (B, h', w')
    large = [cv2.resize(tile, (SHOWN_EDGE, SHOWN_EDGE), interpolation=cv2.INTER_CUBIC) for tile in tiles]
    looked_at = [draw_attention(tile, attention) for tile, attention in zip(large, maps)]
    caption = (
        f"Tiles of {grid.size} px at {grid.mpp:g} microns per pixel, above; the attention to their patches, below."
    )
    return Picture(jpeg_uri(contact_sheet([large, looked_at], columns), quality=88), caption, title=name_of(slide))


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], columns: int) -> np.ndarray:
    """Rows of pictures (SHOWN_EDGE, SHOWN_EDGE, 3) on white, uint8 (h, w, 3); a short row leaves places empty."""
    step = SHOWN_EDGE + GAP
    sheet = np.full((len(rows) * step - GAP, columns * step - GAP, 3), 255, np.uint8)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = row * step, column * step
            sheet[top : top + SHOWN_EDGE, left : left + SHOWN_EDGE] = picture
    return sheet


@plot_style()
def patches_picture(patches: SlidePatches, painted: np.ndarray, slide_mpp: tuple[float, float]) -> np.ndarray:
    """The part of the slide beside its patches as colours, with a scale bar, uint8 (h, w, 3)."""
    figure, axes = panels([patches.overview, painted])
    draw_scale_bar(axes[0], patches.extent[0] * slide_mpp[0])
    return pixels_of(figure)


def name_of(slide: CohortSlide) -> str:
    return f"{slide.key} ({slide.label})." if slide.label else f"{slide.key}."
