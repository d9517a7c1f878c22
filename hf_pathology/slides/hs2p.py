"""Coordinates of hs2p, which slide2vec reads and writes: `<slide>.coordinates.npz` with `<slide>.coordinates.meta.json`."""

from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import write_json
from ..errors import UserError
from .exchange import foreign_grid, require_same_slide, square_edge
from .foreign import naming_read_errors, positive, read_json, read_npy, read_npz, write_npz
from .grid import TileGrid
from .reader import Slide


ARRAYS = ("x", "y", "tissue_fractions")
FIELDS = ("x", "y", "tile_size_resized", "resize_factor", "tile_size_lv0", "target_spacing")  # of the older .npy
UNKNOWN = {
    "segmentation": "tissue_method requested_seg_downsample seg_downsample seg_level seg_spacing_um sthresh sthresh_up "
    "mthresh close sam2_checkpoint_path sam2_config_path mask_path ref_tile_size_px tissue_mask_tissue_value mask_level "
    "mask_spacing_um",
    "filtering": "a_t a_h filter_white filter_black white_threshold black_threshold fraction_threshold filter_grayspace "
    "grayspace_saturation_threshold grayspace_fraction_threshold filter_blur blur_threshold qc_spacing_um",
}  # hs2p wants every key of these sections


def read_hs2p(path: str | Path, slide: Slide, key: str) -> TileGrid:
    """The grid of hs2p's coordinates: an .npz with its .meta.json beside it, or the .npy of its older versions.

    `key` is the slide's key in its cohort. Raises UserError when a file is missing or damaged, or of another slide.
    """
    if Path(path).suffix == ".npy":
        return read_records(path, slide, key)
    arrays, meta = read_npz(path), read_json(meta_path(path))
    if missing := [name for name in ARRAYS if name not in arrays]:
        raise UserError(f"{path} lacks the arrays {missing}: it holds no coordinates of hs2p")
    tiling, about = section(path, meta, "tiling"), section(path, meta, "slide")
    if arrays["x"].ndim != 1 or len({arrays[name].shape for name in ARRAYS}) > 1:
        raise UserError(f"{path} has arrays of shapes {[arrays[name].shape for name in ARRAYS]}: they must be (N,)")
    with naming_read_errors(meta_path(path), "metadata of hs2p"):
        require_same_slide(path, slide, *(about.get("dimensions") or (None, None)))
        edge = positive(path, tiling, "tile_size_lv0")
        step = tiling.get("step_px_lv0") or edge * (1 - (tiling.get("overlap") or 0))
    return foreign_grid(
        path,
        slide,
        key,
        np.column_stack([arrays["x"], arrays["y"]]),
        size=positive(path, tiling, "requested_tile_size_px"),
        extent=(edge, edge),
        stride=(positive(path, {"step_px_lv0": step}, "step_px_lv0"),) * 2,
        mpp=positive(path, tiling, "requested_spacing_um"),
        slide_mpp=(positive(path, about, "base_spacing_um"),) * 2 if about.get("base_spacing_um") else None,
        tissue_fraction=arrays["tissue_fractions"].astype(np.float32),
    )


def read_records(path: str | Path, slide: Slide, key: str) -> TileGrid:
    """The grid of the older format: one record for each tile, which repeats the sizes."""
    records = read_npy(path)
    if not set(FIELDS) <= set(records.dtype.names or ()) or records.ndim != 1 or not len(records):
        raise UserError(f"{path} holds {records.dtype}, not the records of hs2p: {', '.join(FIELDS)}")
    first = {name: records[name][0] for name in FIELDS}
    edge = positive(path, first, "tile_size_lv0")
    return foreign_grid(
        path,
        slide,
        key,
        np.column_stack([records["x"], records["y"]]),
        size=round(positive(path, first, "tile_size_resized") / positive(path, first, "resize_factor")),
        extent=(edge, edge),
        mpp=positive(path, first, "target_spacing"),
    )


def write_hs2p_npz(grid: TileGrid, path: str | Path) -> None:
    """Writes `path`, which ends in `.coordinates.npz`, and its `.meta.json`, last; tiles keep the order of the grid.

    Lost: fractions of a level-0 pixel in extent and stride; how the tissue was found (null in the metadata).
    """
    edge = round(square_edge(grid.extent, grid.slide))
    write_npz(
        path,
        {
            "tile_index": np.arange(len(grid), dtype=np.int32),
            "x": grid.xy[:, 0],
            "y": grid.xy[:, 1],
            "tissue_fractions": grid.tissue_fraction,
        },
    )
    ordered = np.array_equal(np.lexsort((grid.xy[:, 1], grid.xy[:, 0])), np.arange(len(grid)))
    unknown = {name: dict.fromkeys(keys.split()) for name, keys in UNKNOWN.items()}
    provenance = ["mask_path", "backend", "requested_backend", "spacing_at_level_0", "mask_backend"]
    write_json(
        meta_path(path),
        {
            "provenance": {
                "sample_id": Path(grid.slide).stem,
                "image_path": grid.slide,
                **dict.fromkeys([*provenance, "requested_mask_backend"]),
            },
            "slide": {
                "dimensions": grid.slide_size,
                "base_spacing_um": grid.slide_mpp[0],
                "level_downsamples": [1.0],
            },
            "tiling": {
                "requested_tile_size_px": grid.size,
                "requested_spacing_um": grid.mpp,
                "read_level": 0,
                "read_tile_size_px": edge,
                "read_spacing_um": grid.slide_mpp[0],
                "tile_size_lv0": edge,
                "tolerance": 0.0,
                "step_px_lv0": round(grid.stride[0]),
                "overlap": 1 - grid.stride[0] / grid.extent[0],
                "min_tissue_fraction": grid.options.get("min_tissue"),
                "is_within_tolerance": edge == grid.size,
                "n_tiles": len(grid),
            },
            **unknown,
            "artifact": {
                "coordinate_space": "level0_px",
                "tile_order": "x_then_y" if ordered else "as_given",
                **dict.fromkeys(["annotation", "selection_strategy", "output_mode"]),
            },
        },
    )


def meta_path(path: str | Path) -> Path:
    """Where the metadata of an .npz of coordinates lie."""
    return Path(path).with_suffix(".meta.json")


def section(path: str | Path, meta: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the metadata. Raises UserError when it is not there."""
    if not isinstance(meta.get(name), dict):
        raise UserError(f"{meta_path(path)} has no section '{name}': it holds no metadata of hs2p")
    return meta[name]
