"""Labelled tiles in a folder: class sub-folders or a manifest, read into one table, split by group, then decoded."""

import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold
from torch.utils.data import Dataset

from ..errors import UserError
from ..slides.cohort import read_table


SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class LabelledTiles:
    """Labelled tiles, one entry of each array for each tile.

    Attributes:
        folder: what the paths are relative to.
        paths: str (N,), the image files, with "/".
        labels: int64 (N,), indices into `classes`.
        classes: the class names, sorted.
        groups: str (N,), what is never split: the case, or the source image of augmented copies. The tile's own path
            where nothing says.
        splits: str (N,) of "train", "val" or "test", or None when nothing states a split.
        mpp: microns per pixel, or None: not known.
    """

    folder: Path
    paths: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray
    splits: np.ndarray | None
    mpp: float | None

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, split: str) -> "LabelledTiles":
        """The tiles of one split. Raises UserError when no split is stated, or this one lacks a class."""
        if self.splits is None:
            raise UserError(f"{self.folder} states no split: state one, or use split_by_group")
        rows = np.flatnonzero(self.splits == split)
        tiles = replace(
            self, paths=self.paths[rows], labels=self.labels[rows], groups=self.groups[rows], splits=self.splits[rows]
        )
        for label, name in enumerate(self.classes):
            if label not in tiles.labels:
                raise UserError(f"{self.folder} has no tile of class {name} in split {split}: mend the split")
        return tiles


class TileDataset(Dataset):
    """Decoded tiles with their labels: {"tiles": uint8 (h, w, 3), "labels": int}, or `view` of the tile."""

    def __init__(self, tiles: LabelledTiles, view: Callable[[np.ndarray], np.ndarray] | None = None):
        self.tiles = tiles
        self.view = view

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, i: int) -> dict[str, np.ndarray | int]:
        tile = read_tile(self.tiles.folder / self.tiles.paths[i])
        return {"tiles": tile if self.view is None else self.view(tile), "labels": int(self.tiles.labels[i])}


def read_tile(path: str | Path) -> np.ndarray:
    """The image at `path`, uint8 (h, w, 3). Raises UserError that names a file which is not an 8-bit image."""
    try:
        with Image.open(path) as image:
            mode, tile = image.mode, np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): mend or remove it") from error
    if mode not in ("RGB", "RGBA", "L", "P"):
        raise UserError(f"{path} is an image of mode {mode}: save it as 8-bit RGB")
    return tile


def colour_numbers(tiles: LabelledTiles) -> np.ndarray:
    """The mean and standard deviation of red, green and blue of each tile, float32 (N, 6), in 0..255.

    What a classifier can know without looking at tissue. Raises UserError that names a tile which cannot be read.
    """

    def of_tile(path: str) -> np.ndarray:
        pixels = read_tile(tiles.folder / path).astype(np.float32)
        return np.concatenate([pixels.mean(axis=(0, 1)), pixels.std(axis=(0, 1))])

    with ThreadPoolExecutor() as threads:
        return np.stack(list(threads.map(of_tile, tiles.paths)))


def read_tile_folder(folder: str | Path, table: str | Path | None = None, mpp: float | None = None) -> LabelledTiles:
    """The labelled tiles of `folder`, sorted by path within a class folder, in the table's order otherwise.

    Without a table the classes are the sub-folders (`tumour/a.png`), with `train/`, `val/` and `test/` above them if
    there is a split; tiles in a folder below the class (`tumour/case_7/a.png`) are a group named after it. A table
    (the folder's `manifest.csv`, if there is one) has the columns `path`, `class` (or `label`), and optionally `group` (or
    `case`) and `split`.

    Args:
        mpp: microns per pixel of the tiles; None says that it is not known.

    Raises UserError when there is no image, one class only, a file that is missing, or a group on both sides.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: pass a folder of tiles")
    if table is None and (folder / "manifest.csv").is_file():
        table = folder / "manifest.csv"
    rows = _rows_of_class_folders(folder) if table is None else _rows_of_table(folder, table)
    if rows.empty:
        raise UserError(f"{folder} holds no image: expected <class>/<name>.png (or jpg, tif), or a manifest.csv")
    classes = tuple(sorted(set(rows["class"])))
    if len(classes) == 1:
        raise UserError(f"{folder} holds tiles of one class only, {classes[0]}: a classifier needs two")
    tiles = LabelledTiles(
        folder=folder,
        paths=rows["path"].to_numpy(str),
        labels=np.searchsorted(classes, rows["class"].to_numpy(str)),
        classes=classes,
        groups=rows["group"].to_numpy(str),
        splits=None if (rows["split"] == "").all() else rows["split"].to_numpy(str),
        mpp=mpp,
    )
    _check_split(tiles)
    return tiles


def split_by_group(tiles: LabelledTiles, val_fraction: float = 0.2, seed: int = 0) -> LabelledTiles:
    """The same tiles with a "train"/"val" split: about `val_fraction` of each class held out, no group on both sides.

    With few groups more is held out, so that one of each class can be. Raises UserError when a class has too few groups
    to be on both sides.
    """
    groups_of = [len(set(tiles.groups[tiles.labels == label])) for label in range(len(tiles.classes))]
    if min(groups_of) < 2:
        name = tiles.classes[groups_of.index(1)]
        raise UserError(f"{tiles.folder} has one group of class {name}, which cannot be split: add tiles of others")
    n_folds = max(2, min(round(1 / val_fraction), min(groups_of)))
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    for train, val in folds.split(tiles.paths, tiles.labels, tiles.groups):
        if len(set(tiles.labels[train])) == len(set(tiles.labels[val])) == len(tiles.classes):
            splits = np.full(len(tiles), "train")
            splits[val] = "val"
            return replace(tiles, splits=splits)
    raise UserError(f"{tiles.folder} has too few groups to hold out {val_fraction} of every class: state a split")


def _rows_of_class_folders(folder: Path) -> pd.DataFrame:
    """One row (path, class, group, split) for each image below the class folders."""
    names = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    splits = [name for name in names if name in SPLITS]
    if splits and splits != names:
        others = ", ".join(name for name in names if name not in SPLITS)
        raise UserError(f"{folder} holds {others} beside {', '.join(splits)}: only {', '.join(SPLITS)} can be splits")
    rows = []
    for split in splits or [""]:
        for path in sorted((folder / split).glob("*/**/*")):
            if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                continue
            name, *case, _ = path.relative_to(folder / split).parts
            key = path.relative_to(folder).as_posix()
            rows.append({"path": key, "class": name, "group": "/".join(case) or key, "split": split})
    return pd.DataFrame(rows, columns=["path", "class", "group", "split"])


def _rows_of_table(folder: Path, table: str | Path) -> pd.DataFrame:
    """One row (path, class, group, split) for each row of the CSV `table`."""
    rows = read_table(table, required=("path",)).copy()
    for column, other in (("class", "label"), ("group", "case")):
        if column not in rows.columns and other in rows.columns:
            rows[column] = rows[other]
    if "class" not in rows.columns:
        raise UserError(f"{table} has no column class or label: its columns are {', '.join(rows.columns)}")
    for column in ("group", "split"):
        if column not in rows.columns:
            rows[column] = ""
    for path, name in zip(rows["path"], rows["class"]):
        if not (folder / path).is_file():
            raise UserError(f"{table} names {path}, which is not in {folder}: mend the table or add the file")
        if not name:
            raise UserError(f"{table} gives no class for {path}")
    rows["group"] = rows["group"].where(rows["group"] != "", rows["path"])
    return rows[["path", "class", "group", "split"]]


def _check_split(tiles: LabelledTiles) -> None:
    """Raises UserError for a split of another name, a tile without one, and a group that is in two splits."""
    if tiles.splits is None:
        return
    for path, split in zip(tiles.paths, tiles.splits):
        if split not in SPLITS:
            raise UserError(f"{tiles.folder} puts {path} into split {split!r}: known are {', '.join(SPLITS)}")
    sides = pd.Series(tiles.splits).groupby(tiles.groups).nunique()
    if (sides > 1).any():
        raise UserError(f"{tiles.folder} has group {sides.idxmax()} in {sides.max()} splits: keep a group in one")
