"""The second paragraph of every pretraining recipe: the tiles of slides, of shards or of a folder, and what could not be used."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_pathology.errors import SlideError, UserError, require_at_least
from hf_pathology.progress import with_progress
from hf_pathology.slides.cohort import CohortSlide, find_slides, read_cohort
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.tiling import GridOptions, options_of, tile_cohort
from hf_pathology.tiles.blocks import SlideBlocks
from hf_pathology.tiles.filters import FilterOptions, tile_filter
from hf_pathology.tiles.folder_blocks import FolderBlocks
from hf_pathology.tiles.shards import ShardBlocks
from hf_pathology.tiles.stream import TileSource


SLIDES_ONLY = (
    "cohort",
    "grids",
    "slide_mpp",
    "limit",
    "more_mpp",
    "more_weights",
)  # options that shards and folders of tiles have not


@dataclass
class SlideData:
    """Which slides to read, and how; or which shards, or which tiles.

    Attributes:
        out: folder of the run.
        slides: folder of slides.
        cohort: CSV that names the slides to use; all in the folder when None.
        splits: use only the slides of these splits of the cohort table, or the tiles of these splits of the manifest; all
            when None.
        grids: tiling folder to use and fill, in the way it was tiled by `hf-pathology tile`; OUT/tiles when None.
        slide_mpp: microns per level-0 pixel of slides that do not declare it.
        block: edge, in tiles, of the blocks that are read together.
        window: blocks that are mixed together.
        workers: processes that read for each rank; part of what a resumed run must keep to go on bit by bit.
        limit: use only this many slides.
        more_mpp: further resolutions at which the slides are tiled, for encoders that are to know several.
        more_weights: how often a tile of each of them is to be seen, compared with one at `mpp` (1); all 1 when None.
        shards: folder of shards that `hf-pathology shard` wrote, or hf://datasets/ORG/NAME, instead of slides.
        tiles: folder of images of tiles, with or without a `manifest.csv`, instead of slides.
        in_memory: decode the images of `tiles` once, and keep them.
    """

    out: str
    slides: str | None = None
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
    shards: str | None = None
    tiles: str | None = None
    in_memory: bool = False

    def __post_init__(self) -> None:
        sources = [name for name in ("slides", "shards", "tiles") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise UserError("say where the tiles come from: one of --slides, --shards and --tiles")
        given = [name for name in SLIDES_ONLY if not self.slides and getattr(self, name) is not None]
        if given or (self.shards and self.splits):
            raise UserError(f"{[*given, 'splits'][0]} is no option for {sources[0]}: choose when they are written")
        require_at_least(1, block=self.block, window=self.window, limit=self.limit)
        require_at_least(0, workers=self.workers)
        if self.more_weights is not None and len(self.more_weights) != len(self.more_mpp or []):
            raise UserError(f"more_weights are {self.more_weights}: give one for each of more_mpp, {self.more_mpp}")

    def deciding(self) -> dict[str, int]:
        """The options that decide the order of the tiles."""
        return {"block": self.block, "window": self.window}


@dataclass(frozen=True)
class TileData:
    """The tiles that can be trained on.

    Attributes:
        source: of the stream.
        tiles: how many there are.
        fingerprint: a hash of what they are: runs with the same one see the same tiles.
        options: what they were cut with, as far as is known.
        slides: those they are from, once for each resolution; none when they come from shards.
        problems: one message for every slide that was left out.
    """

    source: TileSource
    tiles: int
    fingerprint: str
    options: dict[str, Any]
    slides: Sequence[CohortSlide] = ()
    problems: Sequence[str] = ()

    def deciding(self) -> dict[str, Any]:
        """What decides which tiles are seen."""
        return {**self.options, "tiles": self.fingerprint}


def load_tiles(data: SlideData, options: GridOptions, filters: FilterOptions, accelerator: Accelerator) -> TileData:
    """The tiles that `data` names. Raises UserError when there are none, or when shards or a folder hold other tiles."""
    if data.slides:
        return load_slides(data, options, filters, accelerator)
    return load_shards(data, options, filters) if data.shards else load_folder(data, options, filters, accelerator)


def load_shards(data: SlideData, options: GridOptions, filters: FilterOptions) -> TileData:
    """The tiles of `data.shards`. Raises UserError when they have another size or resolution than `options` say."""
    source = ShardBlocks(data.shards, tile_filter=tile_filter(filters))
    if (source.size, source.mpp) != (options.tile_size, [options.mpp]):
        raise UserError(
            f"{data.shards} has tiles of {source.size} px at {', '.join(map(str, source.mpp))} mpp: "
            f"say so by --tile_size and --mpp (they are {options.tile_size} and {options.mpp})"
        )
    known = {"mpp": options.mpp, "tile_size": options.tile_size}
    return TileData(source, source.tiles, source.fingerprint, known)


def load_folder(data: SlideData, options: GridOptions, filters: FilterOptions, accelerator: Accelerator) -> TileData:
    """The tiles of `data.tiles`. Raises UserError when they have another size than `options` say."""
    source = FolderBlocks(
        data.tiles, splits=data.splits, mpp=options.mpp, in_memory=data.in_memory, tile_filter=tile_filter(filters)
    )
    if source.size != options.tile_size:
        raise UserError(
            f"{data.tiles} has tiles of {source.size} px: say so by --tile_size (it is {options.tile_size})"
        )
    if accelerator.is_main_process:
        for problem in source.problems:
            print(f"left out: {problem}", file=sys.stderr)
    known = {"mpp": options.mpp, "tile_size": options.tile_size}
    return TileData(source, source.tiles, source.fingerprint, known, problems=source.problems)


def load_slides(data: SlideData, options: GridOptions, filters: FilterOptions, accelerator: Accelerator) -> TileData:
    """The tiles of the usable slides, whose grids are made by the main process first and then found by the others.

    Raises UserError when no slide is usable.
    """
    if options.mpp is None:
        raise UserError("say at which resolution the slides are to be cut: --mpp, in microns per pixel")
    options = options_of(data.grids, options.mpp, options.tile_size, options)
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
    source = SlideBlocks(
        grids,
        [slide.path for slide in usable],
        data.block,
        weights=weights if len(set(weights)) > 1 else None,
        tile_filter=tile_filter(filters),
    )
    return TileData(source, sum(map(len, grids)), fingerprint_of(grids), asdict(options), usable, problems)


def fingerprint_of(grids: Sequence[TileGrid]) -> str:
    """A hash of all slides' keys and tiles."""
    digest = hashlib.blake2b(digest_size=8)
    for grid in grids:
        digest.update(grid.slide.encode() + grid.xy.tobytes())
    return digest.hexdigest()
