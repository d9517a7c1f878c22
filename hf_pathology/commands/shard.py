"""`hf-pathology shard`: the tiles of a cohort as a dataset of large files, with its card."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..hub_upload.cards.card import check_licence, write_card
from ..hub_upload.cards.dataset_cards import tiles_card
from ..progress import ProgressBar
from ..record import RunRecord
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from ..slides.tiling import GridOptions, options_of
from ..tiles.blocks import count_blocks
from ..tiles.jpeg_tiles import jpeg_tiles
from ..tiles.shard_formats import GROUP_TILES
from ..tiles.shard_manifest import Manifest
from ..tiles.write_shards import BLOCK, check_format, write_shards
from .cohort import chosen_slides
from .tile import tile_slides


def shard(
    *,
    slides: Path,
    out: Path,
    options: GridOptions,
    tiles: Path | None,
    format: str,
    quality: int,
    shard_mb: int,
    seed: int,
    keep_order: bool,
    verify: bool,
    licence: str | None,
    cohort: Path | None,
    slide_mpp: float | None,
    limit: int | None,
    dry_run: bool,
) -> int:
    """Writes the shards of the slides' tiles into `out`; returns the exit code."""
    how = {"format": format, "quality": quality, "seed": seed, "keep_order": keep_order, "verify": verify}
    check_format(format, quality)
    check_licence(licence)
    options = options_of(tiles, options.mpp, options.tile_size, options)
    record = RunRecord("shard", {"slides": slides, "mpp": options.mpp, "size": options.tile_size, **how})
    chosen = chosen_slides(slides, cohort, slide_mpp, limit, record)
    grids = tile_slides(chosen, tiles or out.resolve().with_name(f"{out.resolve().name}.tiles"), options, record)
    of_key = {slide.key: slide for slide in chosen}
    pairs = [(of_key[grid.slide], grid) for grid in grids]
    if pairs:
        print(estimate(pairs, quality))
    if dry_run or not pairs:
        return record.exit_code
    with ProgressBar("writing", sum(count_blocks(grid, BLOCK) for grid in grids), "tiles") as progress:
        files = write_shards(
            pairs, out, shard_bytes=shard_mb * 10**6, progress=lambda count: progress.advance(units=count), **how
        )
    manifest = Manifest.load(out)
    for problem in manifest.damaged_slides(grids):
        record.failed(problem)
    for slide, grid in pairs:
        record.did(slide.key, tiles=len(grid), unreadable=manifest.unreadable[slide.key])
    write_card(out, tiles_card(pairs=pairs, manifest=manifest, licence=licence))
    record.save(out / "report.json")
    passed = f"{manifest.passed:,} of them as the scanner stored them"
    print(f"{manifest.tiles:,} tiles of {len(pairs)} of {len(chosen)} slides, {passed}, in {len(files)} shards: {out}")
    return record.exit_code


def estimate(pairs: Sequence[tuple[CohortSlide, TileGrid]], quality: int) -> str:
    """How much there is to do, how long it will take and how much it will fill, from some tiles of the middle slide."""
    slide, grid = pairs[len(pairs) // 2]
    rows = np.arange(len(grid))[len(grid) // 2 :][:GROUP_TILES]
    with grid.open(slide.path) as opened:
        started = time.monotonic()
        found = jpeg_tiles(opened, np.asarray(grid.xy[rows]), grid.size, grid.extent, quality=quality)
        seconds = (time.monotonic() - started) / len(rows)
    streams = [tile for tile in found if tile is not None]
    total, each = sum(len(grid) for _, grid in pairs), np.mean([len(tile.stream) for tile in streams] or [0])
    passed = np.mean([tile.passed for tile in streams] or [0])
    return (
        f"{total:,} tiles of {len(pairs)} slides: about {total * each / 1e6:,.0f} MB, {total * seconds / 60:.1f} min on one "
        f"core, {passed:.0%} of the tiles as the scanner stored them"
    )
