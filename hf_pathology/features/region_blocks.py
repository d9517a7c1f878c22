"""The features of regions as a stream for training: grids of tile features, memory-mapped from what `embed` wrote."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..tiles.blocks import TileRows
from .store import SUFFIX, SlideFeatures


class RegionBlocks:
    """The regions of all bags in a folder; a block is one region, and its "tile" a grid of features.

    Args:
        folder: with the files that `hf-pathology embed --regions` wrote, at any depth.
        slides: keys of the slides to use; all when None.
        limit: use only this many of them.

    Attributes:
        grid: tiles along an edge of a region.
        width: length of a tile's feature vector.
        slides: keys of the slides, in the order of their names.
        slide_of: the slide of each region, int64 (regions,), indices of `slides`; regions of a slide follow each other.
        xy: corners of the regions in level-0 pixels, int64 (regions, 2).
        encoder, revision, pooling, mpp, tile_size: of the tiles' features.
        problems: a message for each slide of which regions were left out, because some of their tiles could not be read.

    A `TileSource`, as `SlideBlocks` is. Raises UserError when there is no region, or the bags differ in encoder,
    resolution or region.
    """

    weights = None

    def __init__(self, folder: str | Path, slides: Sequence[str] | None = None, *, limit: int | None = None):
        self.folder = Path(folder)
        self.problems: list[str] = []
        self._bags: dict[int, SlideFeatures] = {}  # those that this process has opened
        self._number_of: dict[tuple[str, int, int], int] | None = None
        found = sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob(f"*{SUFFIX}"))
        keys = [name.removesuffix(SUFFIX) for name in found]
        missing = sorted(set(slides or ()) - set(keys))
        if missing:
            raise UserError(
                f"{folder} has no features of {', '.join(missing[:5])}: run `hf-pathology embed --regions`"
            )
        keys = [key for key in keys if slides is None or key in set(slides)][:limit]
        if not keys:
            raise UserError(f"{folder} holds no features of slides: make them with `hf-pathology embed --regions`")
        self.slides, self._rows = [], []  # of each region, which of its slide's it is
        slide_of, corners, facts = [], [], {}
        for key in keys:
            bag = self._open(key)
            facts.setdefault(
                (bag.encoder, bag.revision, bag.pooling, bag.mpp, bag.size, bag.region, bag.features.shape[1]), key
            )
            whole = np.flatnonzero(np.asarray(bag.valid).reshape(-1, bag.region**2).all(axis=1))
            left_out = len(bag) // bag.region**2 - len(whole)
            if left_out:
                self.problems.append(f"{key}: {left_out} regions with tiles that could not be read are left out")
            slide_of += [len(self.slides)] * len(whole)
            self._rows += whole.tolist()
            corners.append(np.asarray(bag.xy)[whole * bag.region**2])
            self.slides.append(key)
        if len(facts) > 1:
            (one, first), (other, second) = list(facts.items())[:2]
            raise UserError(f"{folder} mixes features: {first} has {one}, {second} has {other}; embed them alike")
        ((self.encoder, self.revision, self.pooling, self.mpp, self.tile_size, self.grid, self.width),) = facts
        if self.grid == 1:
            raise UserError(
                f"{folder} holds features of tiles, not of regions: make them with `hf-pathology embed --regions`"
            )
        if not slide_of:
            raise UserError(f"{folder} holds no region whose tiles could all be read")
        self.slide_of, self.xy = np.array(slide_of), np.concatenate(corners)

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_bags": {}, "_number_of": None}

    def __getitem__(self, region: int) -> np.ndarray:
        """The grid of a region, (grid, grid, width), rows from top to bottom, as a read-only view of the file."""
        slide = int(self.slide_of[region])
        if slide not in self._bags:
            self._bags[slide] = self._open(self.slides[slide])
        first, edge = self._rows[region] * self.grid**2, self.grid
        return self._bags[slide].features[first : first + edge**2].reshape(edge, edge, -1)

    @property
    def fingerprint(self) -> str:
        """A hash of the encoder and of all regions' slides and corners: runs with the same one see the same regions."""
        said = repr((self.encoder, self.revision, self.pooling, self.slides, self.slide_of.tolist()))
        return hashlib.blake2b(said.encode() + self.xy.tobytes(), digest_size=8).hexdigest()

    def numbers(self, slides: Sequence[str], xy: np.ndarray) -> np.ndarray:
        """The numbers, int64 (B,), of the regions of these slides with these corners (B, 2)."""
        if self._number_of is None:
            names = [self.slides[slide] for slide in self.slide_of]
            self._number_of = {(name, *corner): i for i, (name, corner) in enumerate(zip(names, self.xy.tolist()))}
        return np.array([self._number_of[slide, int(x), int(y)] for slide, (x, y) in zip(slides, xy)])

    def read(self, numbers: Sequence[int]) -> TileRows:
        """The grids of these regions."""
        numbers = sorted(numbers)
        slides = [self.slides[slide] for slide in self.slide_of[numbers]]
        return TileRows([self[number] for number in numbers], slides, self.xy[numbers])

    def _open(self, key: str) -> SlideFeatures:
        bag = SlideFeatures.load(self.folder / f"{key}{SUFFIX}", verify=False)
        if bag.region > 1 and len(bag) % bag.region**2:
            raise UserError(f"{self.folder / key}{SUFFIX} has {len(bag)} tiles, no whole regions of {bag.region**2}")
        return bag
