"""The features of one slide with everything needed to use them rightly, kept as one file per slide."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..slides.grid import TileGrid
from ..slides.store import load_arrays, save_arrays


SUFFIX = ".features.safetensors"


@dataclass(frozen=True)
class SlideFeatures:
    """A bag: the features of the tiles of one slide.

    Attributes:
        slide: the slide's key in its cohort.
        encoder: Hub id or directory of the encoder.
        revision: what identifies the encoder's weights: the Hub's commit, or a hash of the weight file.
        pooling: the rule that made a vector of the encoder's output (`features/pooling.py`).
        size, mpp, extent, slide_size: as in the grid the tiles come from.
        features: float32 (N, D); rows of invalid tiles are NaN and must not be used.
        xy: int64 (N, 2), top-left corners in level-0 pixels.
        valid: bool (N,), False where a tile could not be read.
    """

    slide: str
    encoder: str
    revision: str
    pooling: str
    size: int
    mpp: float
    extent: tuple[float, float]
    slide_size: tuple[int, int]
    features: np.ndarray
    xy: np.ndarray
    valid: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def of_grid(
        cls, grid: TileGrid, features: np.ndarray, valid: np.ndarray, *, encoder: str, revision: str, pooling: str
    ) -> "SlideFeatures":
        """The features (N, D) of the tiles of `grid`, with `valid` (N,) saying which could be read."""
        return cls(
            slide=grid.slide,
            encoder=encoder,
            revision=revision,
            pooling=pooling,
            size=grid.size,
            mpp=grid.mpp,
            extent=grid.extent,
            slide_size=grid.slide_size,
            features=features,
            xy=grid.xy,
            valid=valid,
        )

    def save(self, path: str | Path) -> None:
        """Writes the bag to one safetensors file, whole or not at all."""
        fields = asdict(self)
        arrays = {name: fields.pop(name) for name in ("features", "xy", "valid")}
        save_arrays(path, arrays, {"kind": "slide_features", **fields})

    @classmethod
    def load(cls, path: str | Path) -> "SlideFeatures":
        """The bag saved at `path`. Raises UserError when it is missing or damaged."""
        arrays, fields = load_arrays(path)
        if fields.pop("kind", None) != "slide_features":
            raise UserError(f"{path} holds no slide features: make them with `hf-pathology embed`")
        fields["extent"], fields["slide_size"] = tuple(fields["extent"]), tuple(fields["slide_size"])
        return cls(**fields, **arrays)


def features_path(folder: str | Path, slide: str) -> Path:
    """Where the features of the slide with key `slide` lie in a feature folder."""
    return Path(folder) / (slide + SUFFIX)


def load_cohort_features(folder: str | Path, slides: Iterable[str]) -> tuple[list[SlideFeatures], list[str]]:
    """The features of the slides with these keys, and one message for each that has none.

    Raises UserError when the folder mixes encoders, revisions, pooling rules or resolutions.
    """
    bags, missing = [], []
    for slide in slides:
        try:
            bags.append(SlideFeatures.load(features_path(folder, slide)))
        except UserError as error:
            missing.append(f"{slide} has no features: {error}; run `hf-pathology embed`")
    kinds = {(bag.encoder, bag.revision, bag.pooling, bag.size, bag.mpp) for bag in bags}
    if len(kinds) > 1:
        raise UserError(f"{folder} mixes features of {len(kinds)} encoders or resolutions: {sorted(kinds)}")
    return bags, missing
