"""The cards of encoders: of tiles, of regions, and converted from published checkpoints."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from hf_pathology.hub_upload.cards.card import Base, Facts, render_card
from hf_pathology.hub_upload.cards.evaluations import eval_results
from hf_pathology.hub_upload.cards.names import public_name
from hf_pathology.hub_upload.cards.run_facts import RunFacts
from hf_pathology.slides.cohort import CohortSlide
from hf_pathology.tiles.filters import FilterOptions


PAPERS = {
    "DINO": [("Caron et al. 2021, Emerging properties in self-supervised vision transformers", "2104.14294")],
    "iBOT": [("Zhou et al. 2021, iBOT: image BERT pre-training with online tokenizer", "2111.07832")],
    "MAE": [("He et al. 2021, Masked autoencoders are scalable vision learners", "2111.06377")],
    "DINOv2": [("Oquab et al. 2023, DINOv2: learning robust visual features without supervision", "2304.07193")],
    "HIPT-4K": [
        ("Chen et al. 2022, Scaling vision transformers to gigapixel images via hierarchical learning", "2206.02647")
    ],
    "SLPD": [("Yu et al. 2023, SLPD: slide-level prototypical distillation for WSIs", "2307.08259")],
}
TASK = {"library_name": "transformers", "pipeline_tag": "image-feature-extraction"}
TAGS = ["pathology", "whole-slide-image"]


def of_pretraining(
    title: str, method: str, run: RunFacts, *, bases: Sequence[Base], provenance: dict[str, Any], **more: Any
) -> tuple[Facts, ModelCardData]:
    """What the card of every pretrained encoder says, and its metadata with `more` of them."""
    facts = Facts(
        title,
        bases=bases,
        provenance={**provenance, **run.provenance},
        papers=PAPERS.get(method, []),
        **run.for_skeleton(),
    )
    data = ModelCardData(
        **TASK,
        tags=[*TAGS, "self-supervised", method.lower()],
        license=run.licence,
        base_model=facts.hub_bases(),
        model_name=title,
        eval_results=eval_results(facts.evaluations),
        **more,
    )
    return facts, data


def encoder_card(
    *,
    method: str,
    encoder: PreTrainedModel,
    width: int,
    pooling: str,
    config: dict[str, Any],
    run: RunFacts,
    cohort: Any,
    base: Base | None = None,
) -> str:
    """The card of an encoder of tiles, Markdown with its metadata.

    Args:
        method: name of the pretraining method.
        encoder: the transformers model that is released.
        width: of its features.
        pooling: how its output becomes one vector, "cls" or "gap".
        config: every option that decided the result.
        run: what the run has recorded.
        cohort: has `slides`, `tiles`, `fingerprint` and `problems`, see `recipes/slide_data.py`.
        base: the release from which the training started, if from one.
    """
    title = f"{method} encoder for pathology tiles"
    facts, data = of_pretraining(
        title,
        method,
        run,
        bases=[] if base is None else [base],
        provenance={"fingerprint of the tiles": cohort.fingerprint},
        mpp=config["mpp"],
        tile_size=config["global_size"],
    )
    return render_card(
        "encoder",
        data,
        facts,
        method=method,
        model_type=encoder.config.model_type,
        weights=count_of(encoder),
        width=width,
        pooling=pooling,
        prefix_tokens=prefix_tokens(encoder),
        tile_size=config["global_size"],
        mpp=resolution(config["mpp"]),
        slides=len({slide.key for slide in cohort.slides}),
        cases=stated_cases(cohort.slides),
        tiles=cohort.tiles,
        fingerprint=cohort.fingerprint,
        left_out=len(cohort.problems),
        filters=filters_of(config),
    )


def hipt_card(
    *,
    method: str,
    region_encoder: PreTrainedModel,
    tiles: Base,
    whole: bool,
    config: dict[str, Any],
    run: RunFacts,
    regions: int,
    slides: int,
    base: Base | None = None,
) -> str:
    """The card of a hierarchy, or of its second level, Markdown with its metadata.

    Args:
        method: name of the pretraining method of the second level.
        region_encoder: the second level.
        tiles: the encoder of the first.
        whole: whether the first is part of the release.
        config: every option that decided the result.
        run: what the run has recorded.
        regions, slides: how many it was trained on.
        base: the release from which the training of the second level started, if from one.
    """
    title = f"{method}: encoder of regions for pathology"
    facts, data = of_pretraining(
        title,
        method,
        run,
        bases=[tiles] if base is None else [tiles, base],
        provenance={"fingerprint of the regions": config["regions"]},
        mpp=config["mpp"],
        tile_size=config["tile_size"],
        region=config["region"],
    )
    return render_card(
        "hipt",
        data,
        facts,
        method=method,
        whole=whole,
        tile_encoder=tiles.name,
        weights=count_of(region_encoder),
        input_size=region_encoder.config.input_size,
        width=region_encoder.config.hidden_size,
        tile_size=config["tile_size"],
        region=config["region"],
        edge=config["region"] * (config["tile_size"] or 0),
        mpp=resolution(config["mpp"]),
        pooling=config["pooling"],
        regions=regions,
        slides=slides,
        fingerprint=config["regions"],
    )


def converted_card(
    *,
    format: str,
    model: PreTrainedModel,
    conversion: dict[str, Any],
    width: int,
    pooling: str,
    mpp: float | None,
    tile_size: int,
    licence: str | None = None,
) -> str:
    """The card of a published checkpoint in the format of transformers, Markdown with its metadata.

    Args:
        format: of the original file.
        model: what was made of it.
        conversion: the account of it, the content of `conversion.json`: of each of its `sources` the `files` (file, bytes,
            sha256), the `network` that was taken, what it `holds`, how many tensors were `used`, how many of each group were
            `left_out`, what was `unexpected` and `missing`, and its `architecture`.
        width: of its features.
        pooling: how its output becomes one vector.
        mpp: microns per pixel of its tiles, None when that is not known.
        tile_size: their edge in pixels.
        licence: of the original, where those who convert know it.
    """
    model_type = model.config.model_type
    files = [file for source in conversion["sources"] for file in source["files"]]
    title = f"{' and '.join(public_name(file['file']) for file in files)} ({format}), converted for transformers"
    facts = Facts(
        title,
        licence=licence,
        provenance={
            f"SHA-256 of the original `{public_name(file['file'])}` ({file['bytes']:,} bytes)": file["sha256"]
            for file in files
        },
    )
    data = ModelCardData(**TASK, tags=[*TAGS, "converted", format], license=licence, mpp=mpp, tile_size=tile_size)
    return render_card(
        "converted",
        data,
        facts,
        conversion=conversion,
        model_type=model_type,
        remote_code=bool(type(model)._auto_class),
        weights=count_of(model),
        width=width,
        pooling=pooling,
        prefix_tokens=prefix_tokens(model),
        tile_size=tile_size,
        mpp=resolution(mpp),
    )


def stated_cases(slides: Sequence[CohortSlide]) -> int | None:
    """How many cases the slides are of; None where no table says it, and each slide counts as a case of its own."""
    stated = any(slide.case != slide.key for slide in slides)
    return len({slide.case for slide in slides}) if stated else None


def filters_of(config: dict[str, Any]) -> list[str]:
    """The filters of tiles that were used, each with its number."""
    unused = asdict(FilterOptions())
    return [f"`{name}` {config[name]}" for name in unused if config.get(name, unused[name]) != unused[name]]


def resolution(mpp: float | None) -> str:
    """As cards say it."""
    return "an unknown resolution" if mpp is None else f"{mpp} microns per pixel"


def count_of(model: PreTrainedModel) -> int:
    """How many weights the model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def prefix_tokens(model: PreTrainedModel) -> int:
    """How many tokens stand before the patches: the class token and the registers."""
    return 1 + getattr(model.config, "num_register_tokens", 0)
