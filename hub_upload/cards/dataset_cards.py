"""The cards of datasets: tiles in shards, and features."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import DatasetCardData

from hf_pathology.errors import UserError
from hf_pathology.features.bags import feature_keys
from hf_pathology.features.store import SlideFeatures, features_path
from hf_pathology.features.tables import Row
from hf_pathology.hub_upload.cards.card import Base, Facts, check_licence, render_card, sha256_of
from hf_pathology.hub_upload.cards.encoder_cards import TAGS, resolution, stated_cases
from hf_pathology.hub_upload.cards.names import public_name
from hf_pathology.slides.cohort import CohortSlide
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.tiling import grid_path
from hf_pathology.tiles.shard_manifest import NAME, Manifest


def tiles_card(
    *, pairs: Sequence[tuple[CohortSlide, TileGrid]], manifest: Manifest, licence: str | None = None
) -> str:
    """The card of a dataset of tiles, Markdown with the metadata by which `datasets` loads it from disk and from the Hub.

    Args:
        pairs: the slides with their grids.
        manifest: of the shards.
        licence: identifier.
    """
    slides, grids = zip(*pairs)
    parquet = manifest.asked["format"] == "parquet"
    files = [{"split": "train", "path": "data/*.parquet" if parquet else "data/*.tar"}]
    facts = Facts(
        "Tiles of whole-slide images",
        licence=licence,
        provenance={
            f"SHA-256 of `{NAME}`, which holds a SHA-256 of every shard": sha256_of(manifest.folder / NAME),
            "fingerprint of the tiles": fingerprint_of((grid.slide, grid.xy) for grid in grids),
        },
    )
    data = DatasetCardData(
        pretty_name=facts.title,
        license=licence,
        tags=[*TAGS, "histology", manifest.asked["format"]],
        task_categories=["image-feature-extraction"],
        size_categories=[size_category(manifest.tiles)],
        configs=[{"config_name": "default", "data_files": files}],
    )
    mpp = np.array([grid.effective_mpp for grid in grids])
    return render_card(
        "tiles",
        data,
        facts,
        manifest=manifest,
        parquet=parquet,
        gigabytes=sum(shard.bytes for shard in manifest.shards) / 1e9,
        slides=len({slide.key for slide in slides}),
        cases=stated_cases(slides),
        labels=sorted({slide.label for slide in slides if slide.label is not None}),
        unlabelled=sum(slide.label is None for slide in slides),
        mpp_asked=sorted({grid.mpp for grid in grids}),
        mpp=(mpp.min(), mpp.max()),
        min_tissue=sorted({grid.options["min_tissue"] for grid in grids if "min_tissue" in grid.options}),
        unreadable=manifest.unreadable.total(),
        damaged=manifest.damaged_slides(grids),
    )


def features_card(
    folder: str | Path, per: Row | None = None, *, tiling: str | Path | None = None, licence: str | None = None
) -> str:
    """The card of a folder of slide features, Markdown with its metadata; of each file only the header and the corners are read.

    Args:
        folder: that `hf-pathology embed` filled.
        per: what a row is, for the card of the dataset that `to_dataset` makes of it; None for the folder itself.
        tiling: the tiling folder, if it is not in `folder`.
        licence: identifier.

    Raises UserError when the folder holds no features, a file cannot be read, or they are not all of one kind.
    """
    check_licence(licence)
    bags = [SlideFeatures.load(features_path(folder, key), verify=False) for key in feature_keys(folder)]
    first, kinds = bags[0], {(bag.revision, bag.pooling, bag.size, bag.mpp, bag.features.shape[1]) for bag in bags}
    if len(kinds) > 1:
        raise UserError(f"{folder} mixes features of {len(kinds)} encoders or resolutions: keep them in a folder each")
    grid = grid_path(tiling or Path(folder) / "tiles", first.slide)
    facts = Facts(
        "Features of whole-slide images",
        licence=licence,
        bases=[Base(first.encoder, first.revision)],
        provenance={"fingerprint of the tiles": fingerprint_of((bag.slide, bag.xy) for bag in bags)},
    )
    tiles = sum(map(len, bags))
    data = DatasetCardData(
        pretty_name=facts.title,
        license=licence,
        tags=[*TAGS, "histology", "features"],
        task_categories=["image-feature-extraction"],
        size_categories=[size_category(len(bags) if per == "slide" else tiles)],
    )
    return render_card(
        "features",
        data,
        facts,
        per=per,
        slides=len(bags),
        tiles=tiles,
        unreadable=sum(int((~bag.valid).sum()) for bag in bags),
        width=first.features.shape[1],
        dtype=first.features.dtype.name,
        encoder=public_name(first.encoder),
        revision=first.revision,
        pooling=first.pooling,
        size=first.size,
        mpp=resolution(first.mpp),
        region=first.region,
        min_tissue=TileGrid.load(grid, mapped=True).options.get("min_tissue") if grid.is_file() else None,
    )


def fingerprint_of(tiles: Iterable[tuple[str, np.ndarray]]) -> str:
    """A hash of all slides' keys and corners, the same as that of a training on these tiles.

    Args:
        tiles: key and corners (N, 2) of each slide.
    """
    digest = hashlib.blake2b(digest_size=8)
    for slide, xy in tiles:
        digest.update(slide.encode() + np.ascontiguousarray(xy).tobytes())
    return digest.hexdigest()


def size_category(rows: int) -> str:
    """The Hub's name for a dataset of this many rows."""
    ends = {10**3: "1K", 10**4: "10K", 10**5: "100K", 10**6: "1M", 10**7: "10M", 10**8: "100M", 10**9: "1B"}
    passed = [name for end, name in ends.items() if rows >= end]
    ahead = [name for end, name in ends.items() if rows < end]
    if not ahead:
        return f"n>{passed[-1]}"
    return f"{passed[-1]}<n<{ahead[0]}" if passed else f"n<{ahead[0]}"
