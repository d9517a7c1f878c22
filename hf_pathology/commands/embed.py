"""`hf-pathology embed`: the features of every slide's tiles, by any encoder, on one process or many.

    hf-pathology embed SLIDES --encoder owkin/phikon-v2 --out FEATURES
    accelerate launch -m hf_pathology.cli embed SLIDES --encoder owkin/phikon-v2 --out FEATURES

Processes that were launched together, or apart for one folder, share the slides.
"""

import os
import shutil
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..errors import SlideError, UserError, require_at_least
from ..features.embed import SlideGrid, check_resolution, embed_cohort, own_share_first
from ..features.encoder import Encoder, load_encoder
from ..features.forward import TileEncoder
from ..features.regions import REGION_LEVEL, SLIDE_LEVEL, TILE_LEVEL, write_region_features, write_slide_level
from ..features.resume import EmbeddedSlide, EmbedOptions, find_embedded
from ..features.timing import Timing, advice
from ..hub_upload.cards.card import check_licence, write_card
from ..hub_upload.cards.dataset_cards import features_card
from ..progress import ProgressBar
from ..record import RunRecord
from ..report.page import write_report
from ..report.sections import provenance_section, slides_section, timing_section
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from ..slides.staging import remove_abandoned
from ..slides.tiling import GridOptions, options_of, tile_cohort
from .cohort import chosen_slides
from .tile import find_tissue_by, tile_slides


DTYPES = {"float32": 4, "float16": 2}  # bytes of a number
BYTES_BESIDE = 17  # of a tile's features in a file: its corner, and whether it is valid
PATIENCE = timedelta(days=2)  # of a process that is done with the others


def embed(
    *,
    slides: Path,
    encoder: str,
    out: Path,
    tiles: Path | None,
    mpp: float | None,
    size: int | None,
    regions: int | None,
    min_tissue: float,
    partial: bool,
    pooling: str | None,
    other_mpp: bool,
    batch_size: int,
    threads: int | None,
    precision: str,
    dtype: str,
    max_invalid: float,
    stage: Path | None,
    licence: str | None,
    cohort: Path | None,
    slide_mpp: float | None,
    limit: int | None,
    dry_run: bool,
) -> int:
    """Embeds the slides into `out`; returns the exit code, the same in all processes."""
    asked = {"slides": slides, "encoder": encoder, "mpp": mpp, "size": size, "pooling": pooling}
    asked |= {"batch_size": batch_size, "precision": precision, "dtype": dtype, "max_invalid": max_invalid}
    record = RunRecord("embed", asked | ({} if regions is None else {"regions": regions}))
    require_at_least(1, batch_size=batch_size, threads=threads)
    check_licence(licence)
    if dtype not in DTYPES or not 0 <= max_invalid <= 1:
        raise UserError(f"dtype is {dtype!r} and max_invalid {max_invalid}: they are float32 or float16, and a share")
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    with state.local_main_process_first():  # the others find in the cache what it has downloaded
        loaded = load_encoder(encoder, pooling=pooling, device=state.device, precision=precision)
    grid_options = options_of(tiles, mpp, size, None) or GridOptions(
        mpp or known_mpp(loaded),
        size or loaded.size,
        min_tissue=min_tissue,
        partial=partial,
        region=tiles_along(regions, size or loaded.size, loaded),
    )
    check_regions(loaded, grid_options, regions)
    if not other_mpp:
        check_resolution(loaded, grid_options.mpp)
    width = width_of(loaded)
    options = EmbedOptions(batch_size, threads or default_threads(state), dtype, max_invalid, stage)

    if stage is not None and state.is_local_main_process:
        remove_abandoned(stage)
    chosen = chosen_slides(slides, cohort, slide_mpp, limit, record)
    tiling = tiles or out / "tiles"
    tile_level = out if loaded.hierarchy is None else out / TILE_LEVEL
    pairs = tile_together(chosen, tiling, grid_options, record, state)
    if state.is_main_process:
        print(plan(pairs, loaded, tile_level, options, width), flush=True)
    state.wait_for_everyone()
    if not dry_run:
        own = own_share_first(pairs, state.process_index, state.num_processes)
        seconds = embed_slides(own, loaded, tile_level, record, options, shown=state.is_main_process)
        if loaded.hierarchy is not None:
            for slide, facts in record.done.items():
                facts["regions"] = write_region_features(tile_level, out / REGION_LEVEL, slide, loaded)
        found = gather_object([(record.done, record.problems, seconds)])
        merge(record, found)
        if state.is_main_process:
            if loaded.hierarchy is not None:
                write_slide_level(out / SLIDE_LEVEL, out / REGION_LEVEL, sorted(record.done), loaded)
            write_records(record, pairs, chosen, loaded, out, tiling, options, max(each[-1] for each in found))
            if record.done:
                write_cards(out, loaded, tiling, licence)
        state.wait_for_everyone()  # the launcher ends all processes when one ends with an error
    state.destroy_process_group()
    return record.exit_code


def tiles_along(regions: int | None, size: int, encoder: Encoder) -> int:
    """Tiles along an edge of a region of so many pixels, or of the encoder's own regions; 1 for tiles without regions.

    Raises UserError when a region is no whole number of tiles.
    """
    if regions is None:
        return encoder.region
    if regions % size:
        raise UserError(f"--regions is {regions}: it must be a multiple of the size of a tile, {size} px")
    return regions // size


def check_regions(encoder: Encoder, options: GridOptions, regions: int | None) -> None:
    """Raises UserError when tiles that were cut before make no regions of the size that is wanted."""
    if regions is not None and regions != options.region * options.tile_size:
        raise UserError(
            f"--regions is {regions}, but the tiling folder has regions of {options.region * options.tile_size} px: leave "
            "it out, or choose another folder"
        )
    if encoder.hierarchy is not None and options.region == 1:
        raise UserError(
            f"{encoder.name} encodes regions, and the tiling folder has single tiles: tile again with --region "
            f"{encoder.region}, or leave out --tiles"
        )


def known_mpp(encoder: Encoder) -> float:
    """The resolution of the encoder. Raises UserError when nothing says it."""
    if encoder.mpp is None:
        raise UserError(f"{encoder.name} does not say at which resolution it was trained: pass --mpp")
    return encoder.mpp


def width_of(encoder: Encoder) -> int:
    """How many numbers describe a tile, after a trial. Raises UserError when the pooling does not fit the encoder."""
    try:
        return encoder(torch.zeros(1, encoder.size, encoder.size, 3, dtype=torch.uint8)).shape[1]
    except ValueError as error:
        raise UserError(f"{encoder.name}: {error}; pass another --pooling") from error


def default_threads(state: PartialState) -> int:
    """Threads that read: a share of the cores for a GPU, one beside an encoder that needs the cores itself."""
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, available_cores() // on_this_machine) if state.device.type == "cuda" else 1


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tile_together(
    chosen: list[CohortSlide], folder: Path, options: GridOptions, record: RunRecord, state: PartialState
) -> list[SlideGrid]:
    """The slides that can be tiled, with their grids; all processes share the work, the main one tells of it."""
    if state.is_main_process:
        tiled = RunRecord("tile", {})
        grids = tile_slides(chosen, folder, options, tiled)
        record.problems += tiled.problems
    else:
        grids = [
            grid for _, grid in tile_cohort(chosen, folder, options, find_tissue_by) if isinstance(grid, TileGrid)
        ]
    of_key = {slide.key: slide for slide in chosen}
    return [(of_key[grid.slide], grid) for grid in grids]


def embed_slides(
    pairs: Sequence[SlideGrid],
    encoder: TileEncoder,
    out: Path,
    record: RunRecord,
    options: EmbedOptions | None = None,
    *,
    shown: bool = True,
) -> float:
    """Embeds the slides into `out` and returns the seconds it took; what was done and what failed goes into `record`.

    Args:
        shown: whether progress is.
    """
    began = time.monotonic()
    with ProgressBar("embedding", len(pairs) if shown else 0, "tiles") as progress:
        for slide, result in embed_cohort(pairs, encoder, out, options):
            if isinstance(result, SlideError):
                record.failed(str(result))
            else:
                facts = {} if result.found else {"seconds": result.timing.to_json()}
                record.did(slide.key, tiles=result.tiles, unreadable=result.unreadable, found=result.found, **facts)
            if shown:
                progress.advance(units=result.tiles if isinstance(result, EmbeddedSlide) and not result.found else 0)
    return time.monotonic() - began


def merge(record: RunRecord, found: Sequence[tuple[dict, list[str], float]]) -> None:
    """Takes into `record` what all processes did and could not do."""
    for done, problems, _ in found:
        for slide, facts in done.items():
            if slide not in record.done or record.done[slide]["found"]:
                record.did(slide, **facts)
        record.problems += [problem for problem in problems if problem not in record.problems]


def plan(pairs: Sequence[SlideGrid], encoder: Encoder, out: Path, options: EmbedOptions, width: int) -> str:
    """What there is to do, how long it will take and how much it will fill.

    Raises UserError when the disk has no room for it.
    """
    to_do = [pair for pair in pairs if find_embedded(*pair, encoder, out, options) is None]
    done = f" ({len(pairs) - len(to_do)} others are done)" if len(to_do) < len(pairs) else ""
    if not to_do:
        return f"nothing to embed{done}"
    total = sum(len(grid) for _, grid in to_do)
    needed = total * (width * DTYPES[options.dtype] + BYTES_BESIDE)
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if needed > free:
        raise UserError(
            f"{out} has {free / 1e6:,.0f} MB free, and the features of {total:,} tiles need {needed / 1e6:,.0f} MB: "
            "make room, or pass --dtype float16"
        )
    room = f"{needed / 1e6:,.0f} MB of features ({free / 1e6:,.0f} MB free)"
    return f"{total:,} tiles of {len(to_do)} slides{done}: about {how_long(total, to_do, encoder, options)}, {room}"


def write_cards(out: Path, encoder: Encoder, tiling: Path, licence: str | None) -> None:
    """Writes the card of the features, or of those of tiles and of regions, or says why there is none."""
    for folder in (out,) if encoder.hierarchy is None else (out / TILE_LEVEL, out / REGION_LEVEL):
        try:
            write_card(folder, features_card(folder, tiling=tiling, licence=licence))
        except UserError as error:
            print(f"{folder} gets no card: {error}")


def how_long(total: int, pairs: Sequence[SlideGrid], encoder: Encoder, options: EmbedOptions) -> str:
    """How long one process will take for `total` tiles, and what limits it, told by one batch of the first slide."""
    slide, grid = pairs[0]
    corners = grid.xy[: options.batch_size]
    began = time.monotonic()
    try:
        with grid.open(slide.path) as opened:
            tiles, _ = opened.read_tiles(corners, grid.size, grid.extent)
    except SlideError:
        return "an unknown time"  # the slide will be named when its turn comes
    read = (time.monotonic() - began) / min(options.threads, available_cores())
    batch = torch.from_numpy(tiles)
    encoder(batch)  # the first is slower than the others
    began = time.monotonic()
    encoder(batch)
    forward = time.monotonic() - began
    minutes = total / len(corners) * max(read, forward) / 60  # reading goes on beside the encoder
    return (
        f"{minutes:.1f} min for one process, limited by {'reading' if read > forward else 'the encoder'} "
        f"({len(corners) / read:,.0f} tiles/s read by {options.threads} thread{'s' * (options.threads > 1)}, {len(corners) / forward:,.0f} encoded)"
    )


def write_records(
    record: RunRecord,
    pairs: Sequence[SlideGrid],
    chosen: Sequence[CohortSlide],
    encoder: Encoder,
    out: Path,
    tiling: Path,
    options: EmbedOptions,
    seconds: float,
) -> None:
    """Writes `report.json` and `report.html`, and prints what was done, where the time went and what would change it."""
    mine = [facts for facts in record.done.values() if not facts["found"]]
    timing = sum((Timing(**facts["seconds"]) for facts in mine), Timing())
    tiles = sum(facts["tiles"] for facts in mine)
    speed = f"{tiles:,} tiles of {len(mine)} slides in {seconds:.1f} s, {tiles / max(seconds, 1e-9):,.0f} tiles/s"
    hint = advice(timing, threads=options.threads, cores=available_cores(), on_gpu=encoder.device.type == "cuda")
    done = f"{len(record.done)} of {len(chosen)} slides embedded"

    spent = {"tiles": tiles, "clock": round(seconds, 3), "threads": options.threads, **timing.to_json()}
    record.facts = {"timing": spent, "advice": hint}
    record.save(out / "report.json")
    grids, labels = [grid for _, grid in pairs], {slide.key: slide.label for slide in chosen}
    sections = [
        slides_section(tiling, grids, labels, record.problems),
        timing_section(f"{speed}: {hint}.", timing.to_json()),
        provenance_section([record.command_line]),
    ]
    lead = f"{done} by {encoder.name}, revision {encoder.revision}."
    write_report(out / "report.html", "Features", lead, sections)
    if mine:
        print(f"{speed} ({timing}); {hint}")
    print(f"{done}: {out}")
