"""What is embedded already: told by what is in a feature file, never by its name alone."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from .forward import TileEncoder
from .store import SlideFeatures, features_path
from .timing import Timing


MAX_INVALID = 0.01  # share of a slide's tiles that may be unreadable before the slide fails


@dataclass(frozen=True)
class EmbedOptions:
    """How a cohort is embedded.

    Attributes:
        batch_size: tiles that the encoder gets at once.
        threads: that read and decode.
        dtype: of the features in the files, "float32" or "float16".
        max_invalid: share of a slide's tiles that may be unreadable before the slide fails.
        stage: folder on a fast disk to which slides are copied before they are read; None to read them where they lie.
    """

    batch_size: int = 64
    threads: int = 1
    dtype: str = "float32"
    max_invalid: float = MAX_INVALID
    stage: str | Path | None = None


@dataclass(frozen=True)
class EmbeddedSlide:
    """A slide whose features lie in their file.

    Attributes:
        tiles: how many it has.
        unreadable: how many of them could not be read; they are marked invalid.
        found: whether the features were there already.
        timing: what it took, if they were not.
    """

    tiles: int
    unreadable: int
    found: bool
    timing: Timing = field(default_factory=Timing)


def find_embedded(
    slide: CohortSlide, grid: TileGrid, encoder: TileEncoder, out: str | Path, options: EmbedOptions
) -> EmbeddedSlide | None:
    """The features in `out` when they are those of exactly these tiles by exactly this encoder, else None.

    Only the header, the corners and the valid mask are read. A slide whose file is another one than then, or that has more
    unreadable tiles than allowed, is embedded again.
    """
    path = features_path(out, slide.key)
    try:
        bag = SlideFeatures.load(path, verify=False)
    except UserError:
        return None
    file = None if grid.stored is None else (grid.stored.file_bytes, grid.stored.file_time)
    wanted = (
        encoder.revision,
        encoder.pooling,
        grid.size,
        grid.mpp,
        tuple(grid.extent),
        grid.region,
        options.dtype,
        file,
    )
    has = (
        bag.revision,
        bag.pooling,
        bag.size,
        bag.mpp,
        bag.extent,
        bag.region,
        bag.features.dtype.name,
        bag.slide_file,
    )
    if has != wanted or not np.array_equal(bag.xy, grid.xy):
        return None
    unreadable = int((~bag.valid).sum())
    too_many = unreadable > options.max_invalid * len(bag)
    return None if too_many else EmbeddedSlide(len(bag), unreadable, found=True)
