"""The features of regions as a stream for training: grids of tile features, from what `embed` wrote or HIPT's own files."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import UserError
from ..tiles.blocks import TileRows
from .exchange import UNKNOWN, check_features, read_tensor
from .store import SUFFIX, SlideFeatures


@dataclass(frozen=True)
class RegionKind:
    """What all regions of a folder have in common: what made their tiles' features, and their shape.

    Attributes:
        encoder, revision, pooling: of the features.
        mpp, tile_size: of the tiles; None where a file does not say it.
        grid: tiles along an edge of a region.
        width: length of a tile's feature vector.
    """

    encoder: str
    revision: str
    pooling: str
    mpp: float | None
    tile_size: int | None
    grid: int
    width: int


class RegionStore(Protocol):
    """A folder of features of regions, slide by slide."""

    def slides(self) -> list[str]:
        """The keys of all slides, sorted."""

    def look_at(self, slide: str) -> tuple[RegionKind, np.ndarray, np.ndarray, int]:
        """Kind, rows (n,) and corners (n, 2) of the slide's regions, and how many others have unreadable tiles."""

    def grid_of(self, slide: str, row: int) -> np.ndarray:
        """The grid (grid, grid, width) of a region."""


class RegionBlocks:
    """The regions of all slides of a folder; a block is one region, and its "tile" a grid of features.

    Args:
        folder: with the files that `hf-pathology embed --regions` wrote, at any depth, or with tensors of HIPT (.pt).
        slides: keys of the slides to use; all when None.
        limit: use only this many of them.

    Attributes:
        slides: keys of the slides, in the order of their names.
        slide_of: the slide of each region, int64 (regions,), indices of `slides`; regions of a slide follow each other.
        xy: corners of the regions in level-0 pixels, int64 (regions, 2); for tensors, which do not say them, (number, 0).
        problems: a message for each slide of which regions were left out, because some of their tiles could not be read.
        kind: what all regions have in common.

    A `TileSource`, as `SlideBlocks` is. Raises UserError when there is no region, or the files differ in encoder,
    resolution or region.
    """

    weights = None

    def __init__(self, folder: str | Path, slides: Sequence[str] | None = None, *, limit: int | None = None):
        self.folder = Path(folder)
        self._store = open_store(self.folder)
        self._number_of: dict[tuple[str, int, int], int] | None = None
        there = self._store.slides()
        missing = sorted(set(slides or ()) - set(there))
        if missing:
            raise UserError(
                f"{folder} has no features of {', '.join(missing[:5])}: run `hf-pathology embed --regions`"
            )
        self.slides = [key for key in there if slides is None or key in set(slides)][:limit]
        kinds: dict[RegionKind, str] = {}  # with a slide of each
        slide_of, self._rows, corners, self.problems = [], [], [], []
        for number, slide in enumerate(self.slides):
            kind, rows, xy, left_out = self._store.look_at(slide)
            kinds.setdefault(kind, slide)
            slide_of += [number] * len(rows)
            self._rows += rows.tolist()
            corners.append(xy)
            if left_out:
                self.problems.append(f"{slide}: {left_out} regions with tiles that could not be read are left out")
        if len(kinds) > 1:
            (one, first), (other, second) = list(kinds.items())[:2]
            raise UserError(f"{folder} mixes features: {first} has {one}, {second} has {other}; embed them alike")
        self.kind = next(iter(kinds))
        if self.kind.grid == 1:
            raise UserError(
                f"{folder} holds features of tiles, not of regions: make them with `hf-pathology embed --regions`"
            )
        if not slide_of:
            raise UserError(f"{folder} holds no region whose tiles could all be read")
        self.slide_of, self.xy = np.array(slide_of), np.concatenate(corners)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, region: int) -> np.ndarray:
        """The grid of a region, (grid, grid, width), rows from top to bottom; read-only."""
        return self._store.grid_of(self.slides[self.slide_of[region]], self._rows[region])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_number_of": None}

    @property
    def fingerprint(self) -> str:
        """A hash of the encoder and of all regions' slides and corners: runs with the same one see the same regions."""
        kind = self.kind
        said = repr((kind.encoder, kind.revision, kind.pooling, self.slides, self.slide_of.tolist()))
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


def open_store(folder: Path) -> RegionStore:
    """The store in `folder`. Raises UserError when there is none."""
    if any(folder.rglob(f"*{SUFFIX}")):
        return BagStore(folder)
    if any(folder.rglob("*.pt")):
        return TensorStore(folder)
    raise UserError(f"{folder} holds no features of slides: make them with `hf-pathology embed --regions`")


class BagStore:
    """What `hf-pathology embed --regions` wrote: memory-mapped, so that a cohort may be larger than the memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._bags: dict[str, SlideFeatures] = {}  # those that this process has opened

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_bags": {}}

    def slides(self) -> list[str]:
        found = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob(f"*{SUFFIX}"))
        return sorted(name.removesuffix(SUFFIX) for name in found)

    def look_at(self, slide: str) -> tuple[RegionKind, np.ndarray, np.ndarray, int]:
        bag = self._open(slide)
        tiles = bag.region**2
        if len(bag) % tiles:
            raise UserError(f"{self.folder / slide}{SUFFIX} has {len(bag)} tiles, no whole regions of {tiles}")
        whole = np.asarray(bag.valid).reshape(-1, tiles).all(axis=1)
        rows = np.flatnonzero(whole)
        kind = RegionKind(bag.encoder, bag.revision, bag.pooling, bag.mpp, bag.size, bag.region, bag.features.shape[1])
        return kind, rows, np.asarray(bag.xy)[rows * tiles], int((~whole).sum())

    def grid_of(self, slide: str, row: int) -> np.ndarray:
        if slide not in self._bags:
            self._bags[slide] = self._open(slide)
        bag, edge = self._bags[slide], self._bags[slide].region
        return bag.features[row * edge**2 : (row + 1) * edge**2].reshape(edge, edge, -1)

    def _open(self, slide: str) -> SlideFeatures:
        return SlideFeatures.load(self.folder / f"{slide}{SUFFIX}", verify=False)


class TensorStore:
    """HIPT's files: SLIDE_i.pt, the tiles of one region (256, D), or SLIDE.pt, those of all of a slide's (M, 256, D).

    All are looked through once at the start; then those of whole slides stay memory-mapped, and the others, of which there
    may be more than a process can map, are read when they are asked for.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._mapped: dict[Path, np.ndarray] = {}  # those of whole slides that this process has opened
        self._files: dict[str, list[Path]] = {}
        self._seen: dict[Path, tuple[tuple[int, ...], np.ndarray]] = {}  # shape of a grid, and which are whole
        for path in sorted(folder.rglob("*.pt"), key=lambda path: (path.parent, _number_last(path))):
            grids, is_alone = self._regions(path)
            whole = np.array([np.isfinite(grid).all() for grid in grids])
            self._seen[path] = grids.shape[1:], whole
            name = path.relative_to(folder).with_suffix("").as_posix()
            alone = re.fullmatch(r"(.+)_\d+", name) if is_alone else None
            self._files.setdefault(alone[1] if alone else name, []).append(path)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_mapped": {}}

    def slides(self) -> list[str]:
        return sorted(self._files)

    def look_at(self, slide: str) -> tuple[RegionKind, np.ndarray, np.ndarray, int]:
        shapes = {self._seen[path][0] for path in self._files[slide]}
        if len(shapes) > 1:
            raise UserError(f"{self.folder}: the regions of {slide} differ in shape: {sorted(shapes)}")
        ((edge, _, width),) = shapes
        whole = np.concatenate([self._seen[path][1] for path in self._files[slide]])
        rows = np.flatnonzero(whole)
        corners = np.stack([rows, np.zeros_like(rows)], axis=1)
        return RegionKind(UNKNOWN, UNKNOWN, "cls", None, None, edge, width), rows, corners, int((~whole).sum())

    def grid_of(self, slide: str, row: int) -> np.ndarray:
        files = self._files[slide]
        path, place = (files[row], 0) if len(files) > 1 else (files[0], row)
        grids = self._mapped.get(path)
        if grids is None:
            grids, is_alone = self._regions(path)
            if not is_alone:
                self._mapped[path] = grids
        return np.array(grids[place], np.float32)

    def _regions(self, path: Path) -> tuple[np.ndarray, bool]:
        """The grids (M, grid, grid, D) in a file, and whether the file is of one region alone."""
        tensor = read_tensor(path, mapped=True)
        check_features(path, tensor, dimensions=(2, 3))
        regions = tensor[None] if tensor.ndim == 2 else tensor
        edge = isqrt(regions.shape[1])
        if edge**2 != regions.shape[1]:
            raise UserError(f"{path} has {regions.shape[1]} tiles in a region, which form no square")
        return regions.reshape(len(regions), edge, edge, -1), tensor.ndim == 2


def _number_last(path: Path) -> tuple[str, int]:
    """A key that sorts a_2 before a_10."""
    found = re.fullmatch(r"(.*?)_?(\d*)", path.stem)
    return found[1], int(found[2] or 0)
