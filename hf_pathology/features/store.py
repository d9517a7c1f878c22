"""The features of one slide with everything needed to use them rightly, kept as one file per slide."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
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
        features: float32 or float16 (N, D); rows of invalid tiles are NaN and must not be used.
        xy: int64 (N, 2), top-left corners in level-0 pixels.
        valid: bool (N,), False where a tile could not be read.
        region: R, when each R * R consecutive tiles are one region, row by row; 1 when there are none.
        slide_file: size and time of last change (nanoseconds) of the slide's file, by which it is known whether the
            features are still those of the slide; None when unknown.
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
    region: int = 1
    slide_file: tuple[int, int] | None = None

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
            region=grid.region,
            slide_file=None if grid.stored is None else (grid.stored.file_bytes, grid.stored.file_time),
        )

    def save(self, path: str | Path, dtype: str | None = None) -> None:
        """Writes the bag to one safetensors file, whole or not at all.

        Args:
            dtype: of the features in the file, "float16" or "float32"; as they are when None.

        Raises UserError when a feature is too large for float16.
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        arrays = {name: values.pop(name) for name in ARRAYS}
        arrays["features"] = self.features_as(dtype or self.features.dtype)
        save_arrays(path, arrays, {"kind": "slide_features", **values})

    def features_as(self, dtype: str | np.dtype) -> np.ndarray:
        """The features (N, D) as `dtype`. Raises UserError when one is too large for it."""
        with np.errstate(over="ignore"):
            features = self.features.astype(dtype, copy=False)
        if np.isinf(features).sum() > np.isinf(self.features).sum():
            largest = np.nanmax(np.abs(self.features))
            raise UserError(f"{self.slide} has a feature of {largest:g}, too large for {dtype}: keep it as float32")
        return features

    @classmethod
    def load(
        cls,
        path: str | Path,
        rows: Sequence[int] | np.ndarray | None = None,
        *,
        mapped: bool = True,
        verify: bool | None = None,
        dtype: str | None = None,
    ) -> "SlideFeatures":
        """The bag saved at `path`, or the tiles of it that `rows` (indices, or bool (N,)) names, in this order.

        Args:
            mapped: arrays that are read-only views of the file: a third of the time of a copy and no memory, so that a
                cohort may be larger than it; `load_arrays` says when False, copies, is the better choice.
            verify: whether to read the whole file and compare it with its checksums; when None, unless `rows` are asked
                for. With False only the header is read, which is enough to ask what a bag holds.
            dtype: of the features, "float16" or "float32"; as they are in the file when None.

        Raises UserError when the file is missing or damaged.
        """
        whole = rows is None
        arrays, values = load_arrays(path, mapped=mapped or not whole, verify=whole if verify is None else verify)
        if values.pop("kind", None) != "slide_features":
            raise UserError(f"{path} holds no slide features: make them with `hf-pathology embed`")
        try:
            values["extent"], values["slide_size"] = tuple(values["extent"]), tuple(values["slide_size"])
            values["slide_file"] = values.get("slide_file") and tuple(values["slide_file"])
            bag = cls(**values, **arrays)
            if not len(bag.features) == len(bag.xy) == len(bag.valid):
                raise TypeError("its arrays differ in length")
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is no feature file of this version ({error}): embed the slide again") from error
        if not whole:
            bag = replace(bag, **{name: getattr(bag, name)[rows] for name in ARRAYS})
        return bag if dtype is None else replace(bag, features=bag.features_as(dtype))


ARRAYS = ("features", "xy", "valid")


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
