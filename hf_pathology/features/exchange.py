"""Features from other programs: recognised by what is in the file, and put on the tiles that they belong to.

CLAM, TRIDENT and STAMP (.h5), Owkin (.npy), slide2vec (.pt, .npz), and plain tensors (.pt of CLAM, HIPT, INTELLIGENS).
`docs/formats.md` has a table of them; `export.py` writes them.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..slides.deepzoom import deepzoom_corners, deepzoom_grid
from ..slides.exchange import foreign_grid, h5_grid
from ..slides.foreign import (
    naming_read_errors,
    positive,
    read_h5,
    read_json,
    read_npy,
    read_npz,
    require_plausible_zip,
)
from ..slides.grid import TileGrid
from ..slides.reader import Slide
from .store import SlideFeatures


UNKNOWN = "unknown"  # what no file of another program says: the revision of the weights, the pooling


@dataclass(frozen=True)
class ForeignFeatures:
    """What a file of another program says.

    Attributes:
        path: the file.
        features: float32 (N, D), or (M, T, D) for M regions of T tiles.
        coords: (N, 2) or (N, 3), where the tiles are, or None when the file does not say it.
        unit: what `coords` count: "pixels" of level 0, "microns", or Deep Zoom "addresses".
        facts: attributes and metadata.
        encoder: the encoder's name, or None.
    """

    path: Path
    features: np.ndarray
    coords: np.ndarray | None
    unit: str
    facts: dict[str, Any]
    encoder: str | None


def read_features(
    path: str | Path,
    grid: TileGrid | None = None,
    *,
    slide: Slide | None = None,
    key: str | None = None,
    encoder: str | None = None,
    revision: str = UNKNOWN,
    pooling: str = UNKNOWN,
    size: int | None = None,
    mpp: float | None = None,
) -> SlideFeatures:
    """The features of one slide from a file of CLAM, TRIDENT, STAMP, Owkin, slide2vec, HIPT or INTELLIGENS.

    Args:
        grid: the tiles. Rows of a file with coordinates may be in any order and fewer than the tiles; rows of a file
            without them are the tiles of the grid, one by one.
        slide: the open slide, instead of a grid, when the file says where its tiles are (TRIDENT, STAMP, Owkin).
        key: the slide's key in its cohort; the name of its file when None. A grid has it already.
        encoder: what made the features, when the file does not say it, or not as you want to call it.
        revision, pooling: of the encoder; heads refuse features of others than those they were trained on.
        size, mpp: edge and resolution of the tiles, when neither file nor grid says them.

    A row with a number that is not finite is a tile that could not be read. Raises UserError when the file is damaged,
    of no format that is known, does not match the tiles, or when something is still unknown.
    """
    found = recognise(Path(path))
    if not (encoder or found.encoder):
        raise UserError(f"{path} does not say which encoder made its features: pass encoder=...")
    if grid is not None:
        grid = matching_tiles(found, grid)
    elif slide is not None and found.coords is not None:
        grid = own_grid(found, slide, key or slide.path.name, size, mpp)
    else:
        raise UserError(
            f"{path} does not say where its tiles are: pass grid=..., the tiles that the features were made of"
        )
    features = found.features.reshape(-1, found.features.shape[-1])
    valid = np.isfinite(features).all(axis=1)
    features[~valid] = np.nan
    return SlideFeatures.of_grid(
        grid, features, valid, encoder=encoder or found.encoder, revision=revision, pooling=pooling
    )


def recognise(path: Path) -> ForeignFeatures:
    """What lies in `path`, whose first bytes say of what kind it is. Raises UserError when it is of none."""
    with naming_read_errors(path, "features"), open(path, "rb") as file:
        magic = file.read(8)
    if magic == b"\x89HDF\r\n\x1a\n":
        return read_h5_features(path)
    if magic.startswith(b"\x93NUMPY"):
        return read_owkin_features(path)
    if magic.startswith((b"PK", b"\x80")):
        return read_slide2vec_or_tensor(path)
    raise UserError(
        f"{path} holds no features that can be read: it is neither HDF5 (CLAM, TRIDENT, STAMP), nor .npy (Owkin), "
        "nor .npz (slide2vec), nor a file of torch (CLAM, HIPT, INTELLIGENS, slide2vec)"
    )


def read_h5_features(path: Path) -> ForeignFeatures:
    """`features` and `coords` of CLAM or TRIDENT in level-0 pixels, or `feats` and `coords` of STAMP in microns."""
    arrays, facts = read_h5(path, ["features", "feats", "patch_embeddings", "coords"])
    if facts.get("feat_type", "tile") != "tile":
        raise UserError(
            f"{path} holds features of a {facts['feat_type']}, not of tiles: pass what `stamp preprocess` wrote"
        )
    coords = arrays.pop("coords", None)
    if not arrays:
        raise UserError(f"{path} has no dataset 'features' (CLAM, TRIDENT), 'feats' or 'patch_embeddings' (STAMP)")
    features = checked_features(path, next(iter(arrays.values())), dimensions=(2,))
    if coords is not None and coords.shape != (len(features), 2):
        raise UserError(f"{path} has {len(features)} features, and coordinates of shape {coords.shape}")
    encoder = facts.get("extractor", facts.get("encoder"))
    unit = "pixels" if "features" in arrays else "microns"
    return ForeignFeatures(path, features, coords, unit, facts, None if encoder in ("None", None) else str(encoder))


def read_owkin_features(path: Path) -> ForeignFeatures:
    """An (N, 3 + D) array whose first columns are Deep Zoom addresses; `extraction_params.json` may lie beside or above."""
    rows = read_npy(path)
    addressed = rows.ndim == 2 and rows.shape[1] > 3 and rows.dtype.kind == "f"
    if not addressed or not np.array_equal(rows[:, :3], np.rint(abs(rows[:, :3]))):
        raise UserError(
            f"{path} holds {rows.dtype} of shape {rows.shape}: features of Owkin are (N, 3 + D), the first three columns "
            "whole numbers (level, column, row)"
        )
    params = [folder / "extraction_params.json" for folder in path.resolve().parents[:2]]
    facts = next((read_json(file) for file in params if file.is_file()), {})
    features = checked_features(path, rows[:, 3:], dimensions=(2,))
    return ForeignFeatures(path, features, rows[:, :3].astype(np.int64), "addresses", facts, facts.get("extractor"))


def read_slide2vec_or_tensor(path: Path) -> ForeignFeatures:
    """A tensor, or an array `features`, without coordinates; slide2vec's `.meta.json` may lie beside it."""
    meta = path.with_suffix(".meta.json")
    facts = read_json(meta) if meta.is_file() else {}
    kind = facts.get("artifact_type", "tile_embeddings")
    if kind not in ("tile_embeddings", "hierarchical_embeddings"):
        raise UserError(f"{path} holds {kind}: pass the tile_embeddings of slide2vec")
    features = checked_features(path, read_tensor(path), dimensions=(2, 3))
    stated = facts.get("num_tiles", facts.get("num_regions", len(features)))
    if stated != len(features):
        raise UserError(f"{path} has {len(features)} features, and {meta.name} speaks of {stated}")
    return ForeignFeatures(path, features, None, "pixels", facts, facts.get("encoder_name"))


def read_tensor(path: Path, mapped: bool = False) -> np.ndarray:
    """The one tensor of a file of torch, or the array `features` of an .npz. No code in the file is run.

    Args:
        mapped: leave the tensor in the file until its parts are looked at, where torch wrote it as a zip.
    """
    with naming_read_errors(path, "a file of torch or .npz"):
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            require_plausible_zip(path)
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith(".npy") for name in archive.namelist()):
                    return read_npz(path)["features"]
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise UserError(f"{path} holds a {type(tensor).__name__}: features are one dense tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{path} claims a tensor of shape {tuple(tensor.shape)}, more than it holds: it is damaged")
    return (
        tensor.to(torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype).detach().numpy()
    )  # numpy has no bfloat16


def checked_features(path: Path, features: np.ndarray, dimensions: tuple[int, ...]) -> np.ndarray:
    """The features as float32 of their own. Raises UserError as `check_features` does."""
    check_features(path, features, dimensions)
    return np.array(features, dtype=np.float32)


def check_features(path: Path, features: np.ndarray, dimensions: tuple[int, ...]) -> None:
    """Raises UserError unless the features are floats, and have these many dimensions."""
    if features.ndim not in dimensions or not features.size or features.dtype.kind != "f":
        raise UserError(
            f"{path} holds {features.dtype} of shape {features.shape}: features are floats (N, D)"
            + (", or (M, T, D) for regions" if 3 in dimensions else "")
        )


def own_grid(found: ForeignFeatures, slide: Slide, key: str, size: int | None, mpp: float | None) -> TileGrid:
    """The tiles where the file itself says they are."""
    if found.unit == "pixels":
        return h5_grid(found.path, found.coords, found.facts, slide, key, size=size, mpp=mpp)
    if found.unit == "addresses":
        size = size or round(positive(found.path, found.facts, "tile_size"))
        return deepzoom_grid(found.path, found.coords, slide, key, size=size, mpp=mpp)
    microns = positive(found.path, found.facts, "tile_size" if "tile_size" in found.facts else "tile_size_um")
    size = size or positive(found.path, found.facts, "tile_size_px")
    edge, corners = microns / slide.mpp[0], found.coords / slide.mpp[0]  # STAMP takes the mpp of x for both axes
    return foreign_grid(found.path, slide, key, corners, size=size, extent=(edge, edge), mpp=mpp or microns / size)


def matching_tiles(found: ForeignFeatures, grid: TileGrid) -> TileGrid:
    """The tiles of `grid` that the rows of the file belong to, in the file's order."""
    rows = found.features.shape[:-1]  # (N,), or (M, T) of regions
    if len(rows) == 2 and grid.region**2 != rows[1]:
        raise UserError(f"{found.path} has regions of {rows[1]} tiles, and the grid regions of {grid.region**2}")
    if found.coords is None:
        if np.prod(rows) != len(grid):
            raise UserError(f"{found.path} has features of {np.prod(rows)} tiles, and the grid has {len(grid)}")
        return grid
    if found.unit == "addresses":
        corners, _ = deepzoom_corners(found.path, found.coords, grid.size, grid.slide_size)
    else:
        corners = found.coords if found.unit == "pixels" else found.coords / grid.slide_mpp[0]
    places = {tuple(corner): row for row, corner in enumerate(grid.xy.tolist())}
    matches = [places.get(tuple(corner), -1) for corner in np.rint(corners).tolist()]
    if -1 in matches:
        corner = corners[matches.index(-1)].tolist()
        raise UserError(
            f"{found.path} has a tile at {corner}, where the grid has none: pass the grid it was made with"
        )
    return grid.select(np.array(matches))
