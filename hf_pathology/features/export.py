"""Features for other programs, in the files that these write themselves; `exchange.py` reads them again."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..atomic import atomic_path, write_json
from ..errors import UserError
from ..slides.deepzoom import deepzoom_addresses
from ..slides.exchange import square_edge, trident_attributes, usual_stride
from ..slides.foreign import write_h5, write_npy, write_npz
from .store import SlideFeatures


STAMP_VERSION = "2.1.0"  # the first that has this layout; STAMP refuses files of a newer version than itself


def write_features(bag: SlideFeatures, path: str | Path, format: str, **options) -> None:
    """Writes the features of one slide as another program does.

    Args:
        format: "clam", "trident" or "stamp" (.h5), "owkin" (.npy), "slide2vec" (.pt or .npz), "pt" (a plain tensor: the
            `pt_files` of CLAM, INTELLIGENS, HIPT).
        options: `slide_mpp` for "stamp", `region` for "pt" and "slide2vec"; see the functions below.

    Formats with coordinates leave out tiles that could not be read; those without cannot, and refuse. Lost in all of
    them: the revision of the encoder and the pooling. Raises UserError when the format cannot hold these features.
    """
    if format not in WRITERS:
        raise UserError(f"there is no format {format!r}: choose one of {', '.join(WRITERS)}")
    WRITERS[format](bag, Path(path), **options)


def write_clam_features(bag: SlideFeatures, path: Path) -> None:
    """`features` (N, D) and `coords` (N, 2). Lost: size, resolution, encoder."""
    write_h5(path, {"features": readable_features(bag), "coords": bag.xy[bag.valid]}, {})


def write_trident_features(bag: SlideFeatures, path: Path) -> None:
    """The same with the encoder's name, and with what TRIDENT says of coordinates."""
    stride = usual_stride(bag.xy, bag.extent)
    place = trident_attributes(bag.slide, bag.size, bag.extent, bag.mpp, bag.slide_size, stride, path)
    source = {"name": place["name"], "savetodir": place["savetodir"], "encoder": bag.encoder}
    arrays = {"features": readable_features(bag), "coords": bag.xy[bag.valid]}
    write_h5(path, arrays, {"features": source, "coords": place})


def write_stamp_features(bag: SlideFeatures, path: Path, slide_mpp: tuple[float, float] | None = None) -> None:
    """`feats` (N, D) as float16 and `coords` (N, 2) in microns, which need `slide_mpp`: `grid.slide_mpp` has it.

    Raises UserError when features are too large for float16. Lost: digits beyond the third.
    """
    if slide_mpp is None:
        raise UserError(f"{path} cannot be written: STAMP counts in microns, pass slide_mpp=grid.slide_mpp")
    features = readable_features(bag)
    if abs(features).max(initial=0) > np.finfo(np.float16).max:
        raise UserError(f"{path} cannot be written: STAMP keeps float16, and there are features beyond 65504")
    arrays = {"coords": (bag.xy[bag.valid] * slide_mpp[0]).astype(np.float32), "feats": features.astype(np.float16)}
    attributes = {
        "stamp_version": STAMP_VERSION,
        "extractor": bag.encoder,
        "unit": "um",
        "tile_size_um": square_edge(bag.extent, bag.slide) * slide_mpp[0],
        "tile_size_px": bag.size,
        "feat_type": "tile",
    }
    write_h5(path, arrays, {"": attributes})


def write_owkin_features(bag: SlideFeatures, path: Path) -> None:
    """`features.npy`, float32 (N, 3 + D) that starts with Deep Zoom addresses, and `extraction_params.json` beside it.

    Raises UserError when the tiles are not on a Deep Zoom lattice. Lost: the resolution.
    """
    addresses = deepzoom_addresses(bag.xy[bag.valid], bag.size, bag.extent, bag.slide_size, bag.slide)
    write_npy(path, np.hstack([addresses, readable_features(bag)]).astype(np.float32))
    write_json(path.with_name("extraction_params.json"), {"extractor": bag.encoder, "tile_size": bag.size})


def write_slide2vec_features(bag: SlideFeatures, path: Path, region: int = 1) -> None:
    """(N, D), or (M, R * R, D) of regions, as .pt or .npz, and its `.meta.json`, last. Lost: the coordinates.

    The coordinates have a file of their own: `slides.hs2p.write_hs2p_npz` of the grid.
    """
    features = in_regions(bag, path, region)
    if path.suffix == ".npz":
        write_npz(path, {"features": features})
    else:
        write_tensor(path, features)
    kind, counted = ("tile_embeddings", "num_tiles") if region == 1 else ("hierarchical_embeddings", "num_regions")
    meta = {
        "sample_id": Path(bag.slide).stem,
        "artifact_type": kind,
        "format": path.suffix[1:],
        "feature_dim": features.shape[-1],
        counted: len(features),
        "encoder_name": bag.encoder,
        "encoder_level": "tile",
        "feature_dtype": "fp32",
        "requested_tile_size_px": bag.size,
        "requested_spacing_um": bag.mpp,
        "tile_size_lv0": round(square_edge(bag.extent, bag.slide)),
    }
    write_json(path.with_suffix(".meta.json"), meta if region == 1 else meta | {"tiles_per_region": region**2})


def write_pt_features(bag: SlideFeatures, path: Path, region: int = 1) -> None:
    """One float32 tensor (N, D), or (M, R * R, D) of regions as HIPT keeps them. Lost: everything else."""
    write_tensor(path, in_regions(bag, path, region))


def readable_features(bag: SlideFeatures) -> np.ndarray:
    """The features of the tiles that could be read, float32 (N, D), in memory of their own."""
    return bag.features[bag.valid].astype(np.float32)


def write_tensor(path: Path, features: np.ndarray) -> None:
    """Writes one tensor, whole or not at all."""
    with atomic_path(path) as partial:
        torch.save(torch.from_numpy(features), partial)


def in_regions(bag: SlideFeatures, path: Path, region: int) -> np.ndarray:
    """The features (N, D), or (M, R * R, D). Raises UserError when a tile is missing, or tiles are left over."""
    if not bag.valid.all():
        raise UserError(
            f"{path} cannot be written: {np.count_nonzero(~bag.valid)} tiles of {bag.slide} could not be read, and a file "
            "without coordinates cannot leave them out; choose clam, trident or stamp"
        )
    features = readable_features(bag)
    if region == 1:
        return features
    if len(bag) % region**2:
        raise UserError(f"{path} cannot be written: {len(bag)} tiles make no whole regions of {region**2}")
    return features.reshape(-1, region**2, features.shape[1])


WRITERS: dict[str, Callable[..., None]] = {
    "clam": write_clam_features,
    "trident": write_trident_features,
    "stamp": write_stamp_features,
    "owkin": write_owkin_features,
    "slide2vec": write_slide2vec_features,
    "pt": write_pt_features,
}
