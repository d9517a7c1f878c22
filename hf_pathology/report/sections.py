"""The parts of a report that several commands write: slides, pretraining, and where it all came from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from ..record import versions as installed_versions
from ..slides.grid import TileGrid
from ..slides.tiling import overview_path
from .figures import Records, collapse_figure, loss_figure, schedule_figure, series, speed_figure, throughput
from .images import jpeg_uri, shrunk, svg_uri
from .page import Picture, Section, Table


THUMBNAIL_EDGE = 320  # pixels
MAX_THUMBNAILS = 120  # some 3 MB


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
    """The picture of a slide's tissue and grid, small; a blank one when it was lost."""
    path = overview_path(tiles_dir, grid.slide)
    picture = cv2.imread(str(path)) if path.is_file() else None
    picture = np.full((8, 8, 3), 240, np.uint8) if picture is None else cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    caption = f"{label}, {len(grid):,} tiles" if label else f"{len(grid):,} tiles"
    uri = jpeg_uri(shrunk(picture, THUMBNAIL_EDGE), quality=82)
    return Picture(uri, caption, title=grid.slide, width="small", alt=f"{grid.slide} with tissue outline and tiles")


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
    text = f"{records[-1]['step'] + 1:,} steps, {records[-1]['tiles']:,} tiles"
    if len(speed):
        text += f", {np.median(speed):,.0f} tiles per second ({np.median(waited):.0%} of the time waiting for tiles)"
    text += f". Loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last."
    figures = [
        Picture(
            svg_uri(loss_figure(records)),
            "The student's cross-entropy to the teacher. It need not fall all the time, since the teacher and its "
            "temperature change; its signs of collapse are below.",
            "Loss.",
        ),
        Picture(
            svg_uri(collapse_figure(records)),
            "Measured on the features of training tiles during the run.",
            "Does the encoder still tell tiles apart?",
        ),
        Picture(svg_uri(schedule_figure(records)), "As they were at each step.", "Schedules."),
        Picture(svg_uri(speed_figure(records)), "Reading, augmenting and training together.", "Speed."),
    ]
    return Section("Pretraining", text, figures)


def provenance_section(commands: Sequence[str], versions: Mapping[str, str] | None = None) -> Section:
    """The commands that made the report, as typed, and the versions (those installed now when None)."""
    rows = [[name, version] for name, version in (versions or installed_versions()).items()]
    table = Table(["Software", "Version"], rows, "Versions that were installed when this page was written.", 2)
    return Section("How this was made", tables=[table], commands=commands)
