"""`hf-pathology doctor`: does this set-up work, shown by running one tile through all of it."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ..errors import SlideError, UserError
from ..features.encoder import Encoder, load_encoder
from ..record import versions
from ..slides.cohort import find_slides
from ..slides.grid import tile_grid
from ..slides.reader import Slide
from ..slides.tissue import find_tissue


Check = tuple[str, Callable[[], str]]
CHECKED_SLIDES = 20  # opened when a folder holds more


def doctor(*, slides: Path | None, encoder: str | None, slide_mpp: float | None) -> int:
    """Prints one line for each check; returns 0 when all pass."""
    console, failures = Console(), 0
    for name, check in _checks(slides, encoder, slide_mpp):
        try:
            console.print(f"[green]ok[/]    {name}: {check()}", highlight=False, soft_wrap=True)
        except (UserError, OSError) as error:
            failures += 1
            console.print(f"[red]fails[/] {name}: ", error, highlight=False, soft_wrap=True, markup=True)
    console.print("all well" if not failures else f"{failures} checks fail", highlight=False)
    return 1 if failures else 0


def _checks(slides: Path | None, encoder: str | None, slide_mpp: float | None) -> Iterator[Check]:
    yield "versions", lambda: ", ".join(f"{name} {version}" for name, version in versions().items())
    yield "device", _device
    yield "disk", lambda: f"{shutil.disk_usage(slides or Path.cwd()).free / 1e9:.0f} GB free"
    loaded = None
    if encoder is not None:
        loaded = load_encoder(encoder)
        yield "encoder", lambda: _describe(loaded)
    if slides is not None:
        found = find_slides(slides, slide_mpp)
        yield "slides", lambda: f"{len(found)} in {slides}, {min(len(found), CHECKED_SLIDES)} opened below"
        for slide in found[:CHECKED_SLIDES]:
            yield slide.key, partial(_look_at, slide.open(), loaded)


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"no GPU; {torch.get_num_threads()} CPU threads"


def _describe(encoder: Encoder) -> str:
    return f"{encoder.name}, revision {encoder.revision}, {encoder.size} px at {encoder.mpp or 'unknown'} mpp, {encoder.pooling}"


def _look_at(slide: Slide, encoder: Encoder | None) -> str:
    """What the slide is, after reading its tissue, and one tile through the encoder when there is one."""
    with slide:
        size, mpp = (encoder.size, encoder.mpp or slide.mpp[0]) if encoder else (224, 0.5)
        tissue = find_tissue(slide)
        grid = tile_grid(slide, tissue, key=slide.path.name, size=size, mpp=mpp)
        tiles, valid = slide.read_tiles(grid.xy[:1], size, grid.extent)
        if not valid.all():
            raise SlideError(f"{slide.path} opens, but its first tile cannot be read: the file is damaged")
        width, height = slide.dimensions
        facts = f"{width}x{height} px, {slide.mpp[0]:.4g} mpp, tissue {tissue.mask.mean():.0%}, {len(grid)} tiles"
        if encoder is not None:
            facts += f", one tile gives {encoder(torch.from_numpy(tiles)).shape[1]} numbers"
        return facts
