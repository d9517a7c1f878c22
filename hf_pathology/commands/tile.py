"""`hf-pathology tile`: tissue and grid of every slide, with pictures of both."""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SlideError
from ..progress import ProgressBar
from ..record import RunRecord
from ..report.page import write_report
from ..report.sections import provenance_section, slides_section
from ..slides.clam import TISSUE_METHODS, tissue_by
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from ..slides.reader import Slide
from ..slides.tiling import GridOptions, save_options, tile_cohort
from ..slides.tissue import Tissue
from .cohort import chosen_slides


if TYPE_CHECKING:
    from ..features.segmenter import Segmenter

SECONDS_PER_SLIDE = 1.0  # rule of thumb for `--dry-run`: opening, overview, tissue and pictures of a usual slide


def tile(
    *,
    slides: Path,
    out: Path,
    options: GridOptions,
    cohort: Path | None,
    slide_mpp: float | None,
    limit: int | None,
    dry_run: bool,
) -> int:
    """Tiles the slides into `out`; returns the exit code."""
    record = RunRecord("tile", {"slides": slides, **asdict(options)})
    chosen = chosen_slides(slides, cohort, slide_mpp, limit, record)
    if dry_run:
        print(f"{len(chosen)} slides, about {len(chosen) * SECONDS_PER_SLIDE / 60:.0f} min; nothing was written")
        return record.exit_code
    save_options(out, options)
    if options.tissue not in TISSUE_METHODS:
        segmenter_of(options.tissue)  # fails before any slide is touched
    grids = tile_slides(chosen, out, options, record)
    record.save(out / "report.json")
    sections = [
        slides_section(out, grids, {slide.key: slide.label for slide in chosen}, record.problems),
        provenance_section([record.command_line]),
    ]
    tiles = f"{sum(map(len, grids)):,} tiles of {options.tile_size} px at {options.mpp} mpp"
    lead = f"{len(grids)} of {len(chosen)} slides tiled: {tiles}."
    write_report(out / "report.html", "Tiles", lead, sections)
    print(f"{lead} {out / 'report.html'}")
    return record.exit_code


def tile_slides(slides: list[CohortSlide], out: Path, options: GridOptions, record: RunRecord) -> list[TileGrid]:
    """The grids of the slides that can have one, in the slides' order; the others go into `record`."""
    found: dict[str, TileGrid] = {}
    with ProgressBar("tiling", len(slides), "tiles") as progress:
        for slide, grid in tile_cohort(slides, out, options, find_tissue_by):
            if isinstance(grid, SlideError):
                record.failed(str(grid))
                progress.advance()
            else:
                found[slide.key] = grid
                facts = {"tiles": len(grid), "mpp": grid.mpp, "effective_mpp": grid.effective_mpp}
                record.did(slide.key, **facts, slide_mpp=grid.slide_mpp, quality=grid.quality)
                progress.advance(units=len(grid))
    return [found[slide.key] for slide in slides if slide.key in found]


def find_tissue_by(slide: Slide, method: str) -> Tissue:
    """The tissue as `method` finds it: one of `TISSUE_METHODS`, or a segmentation model by Hub id or directory."""
    if method in TISSUE_METHODS:
        return tissue_by(slide, method)
    from ..features.segmenter import find_tissue_by_model  # torch and transformers, which tiling can do without

    return find_tissue_by_model(slide, segmenter_of(method))


@cache
def segmenter_of(method: str) -> "Segmenter":
    """The model that finds tissue, loaded once."""
    from accelerate import PartialState

    from ..features.segmenter import load_segmenter

    return load_segmenter(method, device=PartialState().device)
