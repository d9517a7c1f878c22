"""`hf-pathology heatmap --encoder`: where both levels of a hierarchy look, over whole slides."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..atomic import atomic_path
from ..errors import SlideError, UserError
from ..features.encoder import Encoder, load_encoder
from ..progress import ProgressBar
from ..record import RunRecord
from ..report.heatmap import draw_scale_bar, panels
from ..report.images import jpeg_uri, pixels_of, shrunk
from ..report.page import Picture, Section, write_report
from ..report.sections import provenance_section
from ..report.slide_attention import Drawing, SlideAttention, paint, slide_attention
from ..slides.aperio import write_aperio
from ..slides.reader import Slide
from ..slides.tiling import OVERVIEW_EDGE, GridOptions, options_of, save_picture, tile_cohort
from .cohort import chosen_slides
from .embed import check_regions, known_mpp
from .tile import find_tissue_by


MAX_SHOWN = 60  # slides on the page, some 10 MB
SHOWN_EDGE = 1600  # pixels
EXPLAINED = (
    "Tiles: how the class token of the first level ranks the patches within each tile. Regions: how that of the second ranks "
    "the tiles within each region. Factorised: both together. Blue ranks lowest, red highest; ranks compare places within a "
    "tile or a region, not between them."
)


def attention(
    *,
    slides: Path,
    encoder: str,
    out: Path,
    tiles: Path | None,
    region_head: int | None,
    tile_head: int | None,
    pixel: int,
    slide_mpp: float | None,
    limit: int | None,
) -> int:
    """Writes for each slide a picture of all maps, and the factorised one as a pyramid; returns the exit code."""
    record = RunRecord(
        "heatmap", {"slides": slides, "encoder": encoder, "region_head": region_head, "tile_head": tile_head}
    )
    loaded = load_encoder(encoder)
    drawing = drawing_of(loaded, region_head, tile_head, pixel)
    chosen = chosen_slides(slides, None, slide_mpp, limit, record)
    options = options_of(tiles, None, None, None) or GridOptions(
        known_mpp(loaded), loaded.size, region=loaded.region, partial=True
    )
    check_regions(loaded, options, None)
    shown = set(np.linspace(0, len(chosen) - 1, min(len(chosen), MAX_SHOWN)).astype(int).tolist())
    pictures = []
    with ProgressBar("painting", len(chosen)) as progress:
        for number, (slide, grid) in enumerate(tile_cohort(chosen, tiles or out / "tiles", options, find_tissue_by)):
            try:
                if isinstance(grid, SlideError):
                    raise grid
                with grid.open(slide.path) as opened:
                    found = slide_attention(opened, grid, loaded, drawing)
                    picture = write_pictures(opened, found, out, slide.key)
                regions = len(grid) // grid.region**2
                record.did(slide.key, regions=regions)
                if number in shown:
                    caption = f"{regions:,} region" + "s" * (regions > 1)
                    pictures.append(Picture(jpeg_uri(shrunk(picture, SHOWN_EDGE)), caption, title=slide.key))
            except SlideError as error:
                record.failed(str(error))
            progress.advance()
    record.save(out / "report.json")
    write_page(record, pictures, f"{loaded.name}, revision {loaded.revision}", out)
    print(f"{len(record.done)} of {len(chosen)} slides painted: {out}")
    return record.exit_code


def write_page(record: RunRecord, pictures: Sequence[Picture], hierarchy: str, out: Path) -> None:
    """Writes report.html with the pictures of all slides, or of those that were chosen."""
    shown = (
        "" if len(pictures) == len(record.done) else f" {len(pictures)} of the {len(record.done)} slides are shown."
    )
    sections = [
        Section("Attention", EXPLAINED + shown, pictures, problems=record.problems),
        provenance_section([record.command_line]),
    ]
    lead = f"What both levels of {hierarchy}, look at."
    write_report(out / "report.html", "Where the hierarchy looks", lead, sections)


def drawing_of(encoder: Encoder, region_head: int | None, tile_head: int | None, pixel: int) -> Drawing:
    """What to draw. Raises UserError for an encoder without regions, a head it has not, or pixels that do not fit."""
    if encoder.hierarchy is None:
        raise UserError(
            f"{encoder.name} encodes tiles alone: pass a hierarchy, as `recipes/pretrain_hipt4k.py` makes it"
        )
    config = encoder.hierarchy.config
    for name, head, part in (
        ("region_head", region_head, config.region_config),
        ("tile_head", tile_head, config.tile_config),
    ):
        if head is not None and not 0 <= head < part.num_attention_heads:
            raise UserError(f"{name} is {head}: {encoder.name} has heads 0 to {part.num_attention_heads - 1} there")
    patch = config.tile_config.patch_size
    if pixel < 1 or patch % pixel:
        raise UserError(f"pixel is {pixel}: it must divide the edge of a patch, {patch} px")
    shift = max(patch, config.tile_size // 2 // patch * patch)  # half a tile, as the original's 128 of 256
    return Drawing(region_head, tile_head, pixel, shift)


def write_pictures(slide: Slide, found: SlideAttention, out: Path, key: str) -> np.ndarray:
    """KEY.png: the slide beside its three maps; KEY.npz: these; KEY.attention.svs: the factorised one over the slide.

    Returns the first, uint8 (h, w, 3).
    """
    height, width = found.covered.shape
    size = max(height, width)
    whole = slide.read((0, 0), (width, height), found.mpp)
    painted = {name: paint(whole, scores, found.covered) for name, scores in found.maps.items()}
    write_aperio(out / f"{key}.attention.svs", painted["factorised"], found.mpp)
    step = max(1, -(-size // OVERVIEW_EDGE))
    figure, axes = panels([picture[::step, ::step] for picture in (whole, *painted.values())])
    for each, name in zip(axes, ("slide", *painted)):
        each.text(0.02, 0.98, name, transform=each.transAxes, va="top", fontsize=10)
    draw_scale_bar(axes[0], found.mpp * step)
    picture = pixels_of(figure)
    save_picture(out / f"{key}.png", picture)
    with atomic_path(out / f"{key}.npz") as partial, open(partial, "wb") as file:
        np.savez_compressed(file, covered=found.covered, mpp=found.mpp, **found.maps)
    return picture
