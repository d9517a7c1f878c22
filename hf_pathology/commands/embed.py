"""`hf-pathology embed`: the features of every slide's tiles, by any encoder."""

import time
from pathlib import Path

import torch
from accelerate import PartialState

from ..errors import SlideError, UserError, require_at_least
from ..features.embed import check_resolution
from ..features.embed import embed as embed_slide
from ..features.encoder import Encoder, load_encoder
from ..features.store import SlideFeatures, features_path
from ..progress import ProgressBar
from ..record import RunRecord
from ..report.page import write_report
from ..report.sections import provenance_section, slides_section
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from ..slides.tiling import GridOptions
from .cohort import chosen_slides
from .tile import tile_slides


def embed(
    *,
    slides: Path,
    encoder: str,
    out: Path,
    tiles: Path | None,
    mpp: float | None,
    size: int | None,
    min_tissue: float,
    pooling: str | None,
    other_mpp: bool,
    batch_size: int,
    cohort: Path | None,
    slide_mpp: float | None,
    limit: int | None,
    dry_run: bool,
) -> int:
    """Embeds the slides into `out`; returns the exit code."""
    require_at_least(1, batch_size=batch_size)
    record = RunRecord("embed", {"slides": slides, "encoder": encoder, "mpp": mpp, "size": size, "pooling": pooling})
    loaded = load_encoder(encoder, pooling=pooling, device=PartialState().device)
    options = GridOptions(mpp or known_mpp(loaded), size or loaded.size, None, min_tissue)
    if not other_mpp:
        check_resolution(loaded, options.mpp)
    chosen = chosen_slides(slides, cohort, slide_mpp, limit, record)
    grids = tile_slides(chosen, tiles or out / "tiles", options, record)
    of_key = {slide.key: slide for slide in chosen}
    pairs = [(of_key[grid.slide], grid) for grid in grids]
    if pairs:
        print(estimate(pairs, loaded, batch_size))
    if dry_run or not pairs:
        return record.exit_code
    embed_slides(pairs, loaded, out, record, batch_size)
    record.save(out / "report.json")
    labels = {slide.key: slide.label for slide in chosen}
    sections = [
        slides_section(tiles or out / "tiles", grids, labels, record.problems),
        provenance_section([record.command_line]),
    ]
    lead = f"{len(record.done)} of {len(chosen)} slides embedded by {loaded.name}, revision {loaded.revision}."
    write_report(out / "report.html", "Features", lead, sections)
    print(f"{len(record.done)} of {len(chosen)} slides embedded: {out}")
    return record.exit_code


def known_mpp(encoder: Encoder) -> float:
    """The resolution of the encoder. Raises UserError when its release does not say."""
    if encoder.mpp is None:
        raise UserError(f"{encoder.name} does not say at which resolution it was trained: pass --mpp")
    return encoder.mpp


def embed_slides(
    pairs: list[tuple[CohortSlide, TileGrid]], encoder: Encoder, out: Path, record: RunRecord, batch_size: int = 64
) -> None:
    """Writes the features of each slide to `out`, but for those that lie there already; failures go into `record`."""
    with ProgressBar("embedding", len(pairs), "tiles") as progress:
        for slide, grid in pairs:
            path = features_path(out, slide.key)
            started = time.monotonic()
            try:
                found = is_embedded(path, grid, encoder)
                if not found:
                    embed_slide(grid, slide.open(), encoder, batch_size=batch_size).save(path)
                record.did(slide.key, tiles=len(grid), seconds=round(time.monotonic() - started, 3), found=found)
            except SlideError as error:
                record.failed(str(error))
            progress.advance(units=0 if path.is_file() and found else len(grid))


def is_embedded(path: Path, grid: TileGrid, encoder: Encoder) -> bool:
    """Whether `path` holds the features of exactly these tiles by exactly this encoder."""
    try:
        bag = SlideFeatures.load(path)
    except UserError:
        return False
    same = (bag.revision, bag.pooling, bag.size, bag.mpp) == (encoder.revision, encoder.pooling, grid.size, grid.mpp)
    return same and bag.xy.shape == grid.xy.shape and bool((bag.xy == grid.xy).all())


def estimate(pairs: list[tuple[CohortSlide, TileGrid]], encoder: Encoder, batch_size: int) -> str:
    """How much there is to do, how long it will take and how much it will fill, from one batch of the first slide."""
    slide, grid = pairs[0]
    corners = grid.xy[:batch_size]
    with slide.open() as opened:
        started = time.monotonic()
        tiles, _ = opened.read_tiles(corners, grid.size, grid.mpp)
        read = time.monotonic() - started
    vectors = encoder(torch.from_numpy(tiles))
    started = time.monotonic()
    encoder(torch.from_numpy(tiles))
    forward = time.monotonic() - started
    total = sum(len(grid) for _, grid in pairs)
    minutes = total / len(corners) * max(read, forward) / 60  # reading goes on beside the encoder
    slower = "reading" if read > forward else "the encoder"
    return (
        f"{total:,} tiles of {len(pairs)} slides: about {minutes:.1f} min, limited by {slower} "
        f"({len(corners) / read:,.0f} tiles/s read, {len(corners) / forward:,.0f} encoded), "
        f"{total * vectors.shape[1] * 4 / 1e6:,.0f} MB of features"
    )
