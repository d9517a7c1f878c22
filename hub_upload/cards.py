"""Model cards, made of what a run has recorded; what is not known is said to be missing."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_pathology.training.log import read_log
from hf_pathology.version import __version__


def encoder_card(*, method: str, config: dict[str, Any], log: Path, cohort: Any, training: Any) -> str:
    """The card of an encoder, Markdown with its metadata.

    Args:
        method: name of the pretraining method.
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
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        (files("hf_pathology.model_cards") / "encoder.md.j2").read_text(encoding="utf-8")
    )
    return template.render(
        metadata=data.to_yaml(),
        method=method,
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
