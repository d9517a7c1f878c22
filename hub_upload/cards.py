"""Model cards, made of what a run has recorded; what is not known is said to be missing."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import DatasetCardData, ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_pathology.slides.cohort import CohortSlide
from hf_pathology.slides.grid import TileGrid
from hf_pathology.tiles.shard_manifest import Manifest
from hf_pathology.training.log import read_log
from hf_pathology.version import __version__


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def encoder_card(
    *,
    method: str,
    encoder: Any,
    width: int,
    pooling: str,
    config: dict[str, Any],
    log: Path,
    cohort: Any,
    training: Any,
) -> str:
    """The card of an encoder, Markdown with its metadata.

    Args:
        method: name of the pretraining method.
        encoder: the transformers model that is released.
        width: of its features.
        pooling: how its output becomes one vector, "cls" or "gap".
        config: every option that decided the result.
        log: the run's log.
        cohort: has `slides`, `tiles` and `fingerprint`, see `recipes/slide_data.py`.
        training: has `batch_size`, `accumulation` and `steps`.
    """
    records = read_log(log)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["pathology", "whole-slide-image", "self-supervised", method.lower()],
        mpp=config["mpp"],
        tile_size=config["global_size"],
    )
    return filled(
        "encoder.md.j2",
        metadata=data.to_yaml(),
        method=method,
        model_type=encoder.config.model_type,
        weights=sum(parameter.numel() for parameter in encoder.parameters()),
        width=width,
        pooling=pooling,
        mpp="an unknown resolution" if config["mpp"] is None else f"{config['mpp']} microns per pixel",
        config=config,
        slides=len({slide.key for slide in cohort.slides}),
        cases=len({slide.case for slide in cohort.slides}),
        tiles=cohort.tiles,
        fingerprint=cohort.fingerprint,
        steps=training.steps,
        last=records[-1] if records else {},
        hours=sum(record["seconds"] for record in records) / 3600,
        version=__version__,
    )


def hipt_card(
    *,
    method: str,
    region_encoder: Any,
    tile_encoder: str,
    whole: bool,
    config: dict[str, Any],
    log: Path,
    regions: int,
    slides: int,
    training: Any,
) -> str:
    """The card of a hierarchy, or of its second level, Markdown with its metadata.

    Args:
        method: name of the pretraining method of the second level.
        region_encoder: the second level.
        tile_encoder: name of the first.
        whole: whether the first is part of the release.
        config: every option that decided the result.
        log: the run's log.
        regions, slides: how many it was trained on.
        training: has `steps`.
    """
    records = read_log(log)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["pathology", "whole-slide-image", "self-supervised", method.lower()],
        base_model=tile_encoder if not Path(tile_encoder).exists() else None,
        mpp=config["mpp"],
        tile_size=config["tile_size"],
        region=config["region"],
    )
    return filled(
        "hipt.md.j2",
        metadata=data.to_yaml(),
        method=method,
        whole=whole,
        tile_encoder=tile_encoder,
        weights=sum(parameter.numel() for parameter in region_encoder.parameters()),
        input_size=region_encoder.config.input_size,
        width=region_encoder.config.hidden_size,
        edge=config["region"] * (config["tile_size"] or 0),
        mpp="an unknown resolution" if config["mpp"] is None else f"{config['mpp']} microns per pixel",
        config=config,
        regions=regions,
        slides=slides,
        steps=training.steps,
        last=records[-1] if records else {},
        hours=sum(record["seconds"] for record in records) / 3600,
        version=__version__,
    )


def converted_card(
    *,
    format: str,
    model: "PreTrainedModel",
    conversion: dict[str, Any],
    width: int,
    pooling: str,
    mpp: float | None,
    tile_size: int,
) -> str:
    """The card of an encoder that was converted from a published checkpoint, Markdown with its metadata.

    Args:
        format: of the checkpoint, one of `checkpoint_formats.FORMATS`.
        model: that is released.
        conversion: the account of it, the content of `conversion.json`.
        width: of its features.
        pooling: how its output becomes one vector.
        mpp: microns per pixel of its tiles.
        tile_size: their edge in pixels.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["pathology", "whole-slide-image", "self-supervised", format],
        mpp=mpp,
        tile_size=tile_size,
    )
    return filled(
        "converted.md.j2",
        metadata=data.to_yaml(),
        format=format,
        conversion=conversion,
        weights=sum(parameter.numel() for parameter in model.parameters()),
        width=width,
        pooling=pooling,
        mpp="an unknown resolution" if mpp is None else f"{mpp} microns per pixel",
        tile_size=tile_size,
        version=__version__,
    )


def tiles_card(*, pairs: Sequence[tuple[CohortSlide, TileGrid]], manifest: Manifest) -> str:
    """The card of a dataset of tiles, Markdown with the metadata by which `datasets` loads it from disk and from the Hub.

    Args:
        pairs: the slides with their grids.
        manifest: of the shards.
    """
    slides, grids = zip(*pairs)
    parquet = manifest.asked["format"] == "parquet"
    data = DatasetCardData(
        pretty_name="Tiles of whole-slide images",
        tags=["pathology", "whole-slide-image", "histology", manifest.asked["format"]],
        task_categories=["image-feature-extraction"],
        size_categories=[_size_category(manifest.tiles)],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet" if parquet else "data/*.tar"}],
            }
        ],
    )
    mpp = np.array([grid.effective_mpp for grid in grids])
    return filled(
        "tiles.md.j2",
        metadata=data.to_yaml(),
        manifest=manifest,
        parquet=parquet,
        gigabytes=sum(shard.bytes for shard in manifest.shards) / 1e9,
        slides=len({slide.key for slide in slides}),
        cases=len({slide.case for slide in slides}),
        labels=sorted({slide.label for slide in slides if slide.label is not None}),
        unlabelled=sum(slide.label is None for slide in slides),
        mpp_asked=sorted({grid.mpp for grid in grids}),
        mpp=(mpp.min(), mpp.max()),
        min_tissue=sorted({grid.options["min_tissue"] for grid in grids if "min_tissue" in grid.options}),
        unreadable=manifest.unreadable.total(),
        damaged=manifest.damaged_slides(grids),
        version=__version__,
    )


def _size_category(rows: int) -> str:
    """The Hub's name for a dataset of this many rows."""
    ends = {10**3: "1K", 10**4: "10K", 10**5: "100K", 10**6: "1M", 10**7: "10M", 10**8: "100M", 10**9: "1B"}
    passed = [name for end, name in ends.items() if rows >= end]
    ahead = [name for end, name in ends.items() if rows < end]
    if not ahead:
        return f"n>{passed[-1]}"
    return f"{passed[-1]}<n<{ahead[0]}" if passed else f"n<{ahead[0]}"


def filled(template: str, **values: Any) -> str:
    """The template of that name with its values; a value that is missing is an error."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = (files("hf_pathology.model_cards") / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values)
