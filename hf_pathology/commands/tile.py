"""`hf-pathology tile`: tissue and grid of every slide, with pictures of both."""

from pathlib import Path

from ..errors import SlideError
from ..progress import ProgressBar
from ..record import RunRecord
from ..report.page import write_report
from ..report.sections import provenance_section, slides_section
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from ..slides.tiling import GridOptions, tile_cohort
from .cohort import chosen_slides


SECONDS_PER_SLIDE = 1.0  # rule of thumb for `--dry-run`: opening, overview, tissue and pictures of a usual slide


def tile(
    *,
    slides: Path,
    out: Path,
    mpp: float,
    size: int,
    stride: int | None,
    min_tissue: float,
    cohort: Path | None,
    slide_mpp: float | None,
    limit: int | None,
    dry_run: bool,
) -> int:
    """Tiles the slides into `out`; returns the exit code."""
    options = {"slides": slides, "mpp": mpp, "size": size, "stride": stride, "min_tissue": min_tissue}
    record = RunRecord("tile", options)
    chosen = chosen_slides(slides, cohort, slide_mpp, limit, record)
    if dry_run:
        print(f"{len(chosen)} slides, about {len(chosen) * SECONDS_PER_SLIDE / 60:.0f} min; nothing was written")
        return record.exit_code
    grids = tile_slides(chosen, out, GridOptions(mpp, size, stride, min_tissue), record)
    record.save(out / "report.json")
    sections = [
        slides_section(out, grids, {slide.key: slide.label for slide in chosen}, record.problems),
        provenance_section([record.command_line]),
    ]
    lead = f"{len(grids)} of {len(chosen)} slides tiled: {sum(map(len, grids)):,} tiles of {size} px at {mpp} mpp."
    write_report(out / "report.html", "Tiles", lead, sections)
    print(f"{lead} {out / 'report.html'}")
    return record.exit_code


def tile_slides(slides: list[CohortSlide], out: Path, options: GridOptions, record: RunRecord) -> list[TileGrid]:
    """The grids of the slides that can have one, while progress is shown; the others go into `record`."""
    grids = []
    with ProgressBar("tiling", len(slides), "tiles") as progress:
        for slide, grid in tile_cohort(slides, out, options):
            if isinstance(grid, SlideError):
                record.failed(str(grid))
                progress.advance()
            else:
                grids.append(grid)
                record.did(slide.key, tiles=len(grid), mpp=grid.mpp, slide_mpp=grid.slide_mpp)
                progress.advance(units=len(grid))
    return grids
