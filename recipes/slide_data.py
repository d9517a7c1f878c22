"""The first paragraph of every pretraining recipe: the slides of a folder, tiled, and what could not be used."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        more_mpp: further resolutions at which the slides are tiled, for encoders that are to know several.
        more_weights: how often a tile of each of them is to be seen, compared with one at `mpp` (1); all 1 when None.
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
    more_mpp: list[float] | None = None
    more_weights: list[float] | None = None

    def __post_init__(self) -> None:
        require_at_least(1, block=self.block, window=self.window, limit=self.limit)
        require_at_least(0, workers=self.workers)
        if self.more_weights is not None and len(self.more_weights) != len(self.more_mpp or []):
            raise UserError(f"more_weights are {self.more_weights}: give one for each of more_mpp, {self.more_mpp}")

    def deciding(self) -> dict[str, int]:
        """The options that decide the order of the tiles."""
        return {"block": self.block, "window": self.window}


@dataclass(frozen=True)
class TiledSlides:
    """The slides that can be trained on.

    Attributes:
        slides, grids: one of each for every usable slide (and resolution).
        weights: how often the tiles of each grid are to be seen; None for all the same.
        problems: one message for every slide that was left out.
    """

    slides: Sequence[CohortSlide]
    grids: Sequence[TileGrid]
    weights: Sequence[float] | None
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
    found: list[tuple[CohortSlide, TileGrid, float]] = []
    scales = [(options.mpp, 1.0), *zip(data.more_mpp or [], data.more_weights or [1.0] * len(data.more_mpp or []))]
    with accelerator.main_process_first():
        for mpp, weight in scales:
            folder = Path(data.grids or Path(data.out) / "tiles")
            folder = folder if mpp == options.mpp else folder / f"mpp_{mpp:g}"
            results = tile_cohort(slides, folder, replace(options, mpp=mpp))
            if accelerator.is_main_process:
                results = with_progress(results, "tiling", len(slides))
            for slide, grid in results:
                if isinstance(grid, SlideError):
                    problems.append(str(grid))
                else:
                    found.append((slide, grid, weight * slide.weight))
    found.sort(key=lambda each: (each[1].mpp, each[0].key))  # the same on every rank, whichever was tiled first
    if accelerator.is_main_process:
        for problem in problems:
            print(f"left out: {problem}", file=sys.stderr)
    if not found:
        raise UserError(f"{data.slides}: no slide can be used" + (f"; first: {problems[0]}" if problems else ""))
    usable, grids, weights = (list(column) for column in zip(*found))
    return TiledSlides(usable, grids, weights if len(set(weights)) > 1 else None, problems)
