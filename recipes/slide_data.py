"""The first paragraph of every pretraining recipe: the slides of a folder, tiled, and what could not be used."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from hf_pathology.errors import SlideError, UserError, require_at_least
from hf_pathology.progress import with_progress
from hf_pathology.slides.cohort import CohortSlide, find_slides, read_cohort
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.tiling import GridOptions, tile_cohort


@dataclass
class SlideData:
    """Which slides to read, and how.

    Attributes:
        slides: folder of slides.
        out: folder of the run.
        cohort: CSV that names the slides to use; all in the folder when None.
        splits: use only the slides of these splits of the cohort table; all when None.
        grids: tiling folder to use and fill; OUT/tiles when None.
        slide_mpp: microns per level-0 pixel of slides that do not declare it.
        block: edge, in tiles, of the blocks that are read together.
        window: blocks that are mixed together.
        workers: processes that read for each rank; part of what a resumed run must keep to go on bit by bit.
        limit: use only this many slides.
    """

    slides: str
    out: str
    cohort: str | None = None
    splits: list[str] | None = None
    grids: str | None = None
    slide_mpp: float | None = None
    block: int = 2
    window: int = 64
    workers: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        require_at_least(1, block=self.block, window=self.window, limit=self.limit)
        require_at_least(0, workers=self.workers)

    def deciding(self) -> dict[str, int]:
        """The options that decide the order of the tiles."""
        return {"block": self.block, "window": self.window}


@dataclass(frozen=True)
class TiledSlides:
    """The slides that can be trained on.

    Attributes:
        slides, grids: one of each for every usable slide.
        problems: one message for every slide that was left out.
    """

    slides: Sequence[CohortSlide]
    grids: Sequence[TileGrid]
    problems: Sequence[str]

    @property
    def paths(self) -> list[Path]:
        return [slide.path for slide in self.slides]

    @property
    def tiles(self) -> int:
        return sum(len(grid) for grid in self.grids)

    @property
    def fingerprint(self) -> str:
        """A hash of all slides' keys and tiles: runs with the same one see the same tiles."""
        digest = hashlib.blake2b(digest_size=8)
        for grid in self.grids:
            digest.update(grid.slide.encode() + grid.xy.tobytes())
        return digest.hexdigest()


def load_slides(data: SlideData, options: GridOptions, accelerator: Accelerator) -> TiledSlides:
    """The usable slides of `data.slides` with their grids, made by the main process first and then found by the others.

    Raises UserError when no slide is usable.
    """
    slides, problems = find_slides(data.slides, data.slide_mpp), []
    if data.cohort:
        slides, problems = read_cohort(data.cohort, data.slides, data.slide_mpp)
    if data.splits:
        slides = [slide for slide in slides if slide.split in data.splits]
    slides = slides[: data.limit]
    usable, grids = [], []
    with accelerator.main_process_first():
        results = tile_cohort(slides, data.grids or Path(data.out) / "tiles", options)
        if accelerator.is_main_process:
            results = with_progress(results, "tiling", len(slides))
        for slide, grid in results:
            if isinstance(grid, SlideError):
                problems.append(str(grid))
            else:
                usable.append(slide)
                grids.append(grid)
    if accelerator.is_main_process:
        for problem in problems:
            print(f"left out: {problem}", file=sys.stderr)
    if not usable:
        raise UserError(f"{data.slides}: no slide can be used" + (f"; first: {problems[0]}" if problems else ""))
    return TiledSlides(usable, grids, problems)
