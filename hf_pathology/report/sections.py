"""The parts of a report that several commands write: slides, pretraining, and where it all came from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from ..errors import UserError
from ..record import versions as installed_versions
from ..slides.grid import TileGrid
from ..slides.tiling import draw_grid, mask_path, overview_path
from ..slides.tissue import Tissue
from .figures import (
    COLLAPSE,
    Records,
    collapse_figure,
    has,
    loss_figure,
    schedule_figure,
    series,
    speed_figure,
    throughput,
)
from .images import jpeg_uri, shrunk, svg_uri
from .page import Picture, Section, Table


THUMBNAIL_EDGE = 320  # pixels
MAX_THUMBNAILS = 120  # some 3 MB
MIN_DRAWN_TILE = 6.0  # pixels of a thumbnail; the lines of smaller tiles would hide the tissue


def slides_section(
    tiles_dir: str | Path,
    grids: Sequence[TileGrid],
    labels: Mapping[str, str | None],
    problems: Sequence[str] = (),
) -> Section:
    """The slides with their tissue and tiles; an evenly spaced choice of them when there are very many.

    Args:
        tiles_dir: a folder that `hf-pathology tile` filled.
        labels: class name of a slide by its key, None or absent when it has none.
        problems: one message for each slide that was left out.
    """
    chosen = np.unique(np.linspace(0, len(grids) - 1, min(len(grids), MAX_THUMBNAILS)).astype(int))
    pictures = [thumbnail(tiles_dir, grids[index], labels.get(grids[index].slide)) for index in chosen]
    shown = "" if len(chosen) == len(grids) else f" {len(chosen)} of the {len(grids)} slides are shown."
    text = f"Green outlines what was taken for tissue, blue the tiles that were cut from it.{shown}"
    return Section("Slides", text, pictures, [slide_table(grids, labels)] if grids else [], problems)


def thumbnail(tiles_dir: str | Path, grid: TileGrid, label: str | None) -> Picture:
    """The picture of a slide's tissue and tiles, small, with both drawn anew where they would be too thin to see."""
    picture = shrunk(read_jpeg(overview_path(tiles_dir, grid.slide)), THUMBNAIL_EDGE)
    extent = (grid.slide_size[0] / picture.shape[1], grid.slide_size[1] / picture.shape[0])
    if grid.extent[0] / extent[0] >= MIN_DRAWN_TILE:
        picture = draw_grid(picture, extent, Tissue.load(mask_path(tiles_dir, grid.slide)), grid)
    caption = f"{label}, {len(grid):,} tiles" if label else f"{len(grid):,} tiles"
    alt = f"{grid.slide} with tissue outline and tiles"
    return Picture(jpeg_uri(picture, quality=82), caption, title=grid.slide, width="small", alt=alt)


def read_jpeg(path: Path) -> np.ndarray:
    """The RGB picture at `path`, uint8 (h, w, 3). Raises UserError when it is missing or damaged."""
    picture = cv2.imread(str(path)) if path.is_file() else None
    if picture is None:
        raise UserError(
            f"{path} is missing or damaged: delete the grid of this slide and run `hf-pathology tile` again"
        )
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def slide_table(grids: Sequence[TileGrid], labels: Mapping[str, str | None]) -> Table:
    """Slides, tiles and tissue in the tiles for each class."""
    classes = sorted({labels.get(grid.slide) or "no label" for grid in grids})
    groups = {name: [grid for grid in grids if (labels.get(grid.slide) or "no label") == name] for name in classes}
    if len(groups) > 1:
        groups["all"] = list(grids)
    rows = [
        [
            name,
            f"{len(members):,}",
            f"{sum(map(len, members)):,}",
            f"{np.median([len(grid) for grid in members]):,.0f}",
            f"{sum(map(tissue_area_mm2, members)):,.1f}",
        ]
        for name, members in groups.items()
    ]
    sizes = sorted({(grid.size, grid.mpp) for grid in grids})
    cut = " and ".join(f"{size} px at {mpp:g} microns per pixel" for size, mpp in sizes)
    columns = ["Class", "Slides", "Tiles", "Median tiles of a slide", "Tissue in tiles (mm²)"]
    return Table(columns, rows, f"Tiles of {cut}.")


def tissue_area_mm2(grid: TileGrid) -> float:
    """The area of the tissue in the tiles of one slide; where tiles overlap it counts only once on average."""
    step_mm2 = np.prod(grid.stride) * np.prod(grid.slide_mpp) / 1e6
    tile_mm2 = (grid.size * grid.mpp) ** 2 / 1e6
    return float(grid.tissue_fraction.sum() * min(step_mm2, tile_mm2))


def pretraining_section(records: Records) -> Section:
    """What the log of a pretraining run says; `records` are its lines (`training.log.read_log`)."""
    if not records:
        return Section("Pretraining", "The run has left no record.")
    _, losses = series(records, "loss")
    _, speed, waited = throughput(records)
    text = f"The log reaches step {records[-1]['step']:,}, after {records[-1]['images']:,} tiles"
    if len(speed):
        text += (
            f", at {np.median(speed):,.0f} tiles per second ({np.median(waited):.0%} of the time waiting for tiles)"
        )
    text += f". The loss was {losses[0]:.3f} at first and {losses[-1]:.3f} at last."
    figures = [
        Picture(
            svg_uri(loss_figure(records)),
            "The student's cross-entropy to the teacher. It need not fall all the time, since the teacher and its "
            "temperature change; the signs of collapse say whether it learns.",
            "Loss.",
        ),
        Picture(svg_uri(schedule_figure(records)), "As they were at each step.", "Schedules."),
    ]
    if any(has(records, name) for name in COLLAPSE):
        how = "Measured on the features of training tiles during the run."
        figures.insert(1, Picture(svg_uri(collapse_figure(records)), how, "Does the encoder still tell tiles apart?"))
    if len(speed):
        how = "Reading, augmenting and training together."
        figures.append(Picture(svg_uri(speed_figure(records)), how, "Speed."))
    return Section("Pretraining", text, figures)


def timing_section(text: str, seconds: Mapping[str, float]) -> Section:
    """Where the time of a long command went: its `seconds` by what they were spent on."""
    total = sum(seconds.values()) or 1.0
    rows = [[name, f"{spent:,.1f}", f"{spent / total:.0%}"] for name, spent in seconds.items()]
    caption = "Added up over all threads and processes, which work at the same time."
    return Section("Where the time went", text, tables=[Table(["Part", "Seconds", "Share"], rows, caption)])


def provenance_section(commands: Sequence[str], versions: Mapping[str, str] | None = None) -> Section:
    """The commands that made the report, as typed, and the versions (those installed now when None)."""
    cells = [cell for pair in (versions or installed_versions()).items() for cell in pair]
    cells += [""] * (-len(cells) % 6)
    rows = [cells[start : start + 6] for start in range(0, len(cells), 6)]
    caption = "Versions that were installed when this page was written."
    table = Table(["Software", "Version"] * 3, rows, caption, text_columns=6)
    return Section("How this was made", tables=[table], commands=commands)
