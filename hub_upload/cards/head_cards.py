"""The cards of what is trained on labels: heads that classify slides, and adapters of encoders."""

from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from hf_pathology.hub_upload.cards.card import Base, Facts, render_card
from hf_pathology.hub_upload.cards.cost import Cost
from hf_pathology.hub_upload.cards.encoder_cards import TAGS, count_of, resolution
from hf_pathology.hub_upload.cards.evaluations import eval_results, of_slide_head, of_tile_classifier
from hf_pathology.hub_upload.cards.names import public_name


HEADS = {  # by the model type, and how regions are made in HIPT's
    "abmil": "gated attention over tiles",
    "dsmil": "for each class, attention to tiles that are like its most telling one",
    "deep_attn_misl": "layers of its own for each kind of tile, and attention over the kinds",
    "deep_graph_conv": "convolutions over a graph of similar tiles, and attention",
    "hipt_slide transformer": "HIPT's transformers over the tiles of a region and over regions",
    "hipt_slide attention": "gated attention over the tiles of a region and over regions",
}
PAPERS = {
    "abmil": [("Ilse et al. 2018, Attention-based deep multiple instance learning", "1802.04712")],
    "dsmil": [("Li et al. 2021, Dual-stream multiple instance learning network", "2011.08939")],
    "deep_attn_misl": [
        (
            "Yao et al. 2020, Whole slide images based cancer survival prediction using attention guided deep MIL",
            "2009.11169",
        )
    ],
    "deep_graph_conv": [("Xu et al. 2019, How powerful are graph neural networks?", "1810.00826")],
    "hipt_slide": [
        ("Chen et al. 2022, Scaling vision transformers to gigapixel images via hierarchical learning", "2206.02647")
    ],
    "lora": [("Hu et al. 2021, LoRA: low-rank adaptation of large language models", "2106.09685")],
}
FORMS = {
    "adapter": "LoRA adapter for pathology tiles",
    "merged": "Encoder for pathology tiles, adapted by LoRA",
    "classifier": "Classifier of pathology tiles, adapted by LoRA",
    "head": "Linear head over an encoder adapted by LoRA",
}


def head_card(
    head: PreTrainedModel,
    metrics: dict[str, Any] | None = None,
    *,
    cost: Cost | None = None,
    licence: str | None = None,
    region_encoder: Base | None = None,
) -> str:
    """The card of a head that classifies slides, Markdown with its metadata.

    Args:
        head: says by its configuration what its features are.
        metrics: the content of the `metrics.json` of `train_mil`; what is only in there is not recorded when None.
        cost: of the training.
        licence: identifier.
        region_encoder: the hierarchy with whose second level it started, if with one.
    """
    metrics, config = metrics or {}, head.config
    kind = config.model_type
    of_regions = getattr(config, "local", None)
    known_as = HEADS.get(kind if of_regions is None else f"{kind} {of_regions}", kind)
    title = f"Slide classifier: {' or '.join(config.id2label.values())}"
    bases = [] if config.encoder is None else [Base(config.encoder, config.encoder_revision)]
    facts = Facts(
        title,
        licence=licence,
        bases=[*bases, *([] if region_encoder is None else [region_encoder])],
        steps=["Adam on batches of padded bags, the number of epochs fixed; trained on all slides above"]
        if metrics
        else [],
        options={**metrics["training"], **metrics["head"]} if metrics else None,
        cost=cost,
        evaluations=of_slide_head(metrics) if metrics else [],
        provenance=versions_of(metrics),
        papers=PAPERS.get(kind, []),
    )
    data = ModelCardData(
        library_name="transformers",
        tags=[*TAGS, "multiple-instance-learning", kind],
        license=licence,
        base_model=facts.hub_bases(),
        model_name=title,
        eval_results=eval_results(facts.evaluations),
        mpp=config.mpp,
        tile_size=config.tile_size,
    )
    return render_card(
        "head",
        data,
        facts,
        head=known_as,
        weights=count_of(head),
        classes=list(config.id2label.values()),
        input_dim=config.input_dim,
        encoder="not recorded" if config.encoder is None else public_name(config.encoder),
        revision=config.encoder_revision,
        pooling=config.pooling,
        tile_size=config.tile_size,
        region_tiles=getattr(config, "region_tiles", None),
        mpp=resolution(config.mpp),
        slides=metrics.get("slides", {}),
        cases=metrics.get("cases"),
        missing=len(metrics.get("missing", [])),
    )


def adapter_card(
    metrics: dict[str, Any],
    *,
    form: str,
    base: Base,
    width: int,
    pooling: str,
    prefix_tokens: int,
    mpp: float | None,
    tile_size: int,
    cost: Cost | None = None,
    licence: str | None = None,
) -> str:
    """The card of what `finetune_lora` writes, Markdown with its metadata.

    Args:
        metrics: the content of its `metrics.json`.
        form: which of its folders: "adapter", "merged", "classifier", or "head" for a head that is saved alone.
        base: the encoder that was adapted.
        width, pooling, prefix_tokens, mpp, tile_size: how the encoder is used.
        cost: of the training.
        licence: identifier.
    """
    title = FORMS[form]
    facts = Facts(
        title,
        licence=licence,
        bases=[base],
        steps=[f"LoRA on the query and value projections; losses of the epochs: {losses_of(metrics)}"],
        options={name: value for name, value in metrics["options"].items() if name not in ("out", "cpu", "workers")},
        cost=cost,
        evaluations=of_tile_classifier(metrics),
        provenance=versions_of(metrics),
        papers=PAPERS["lora"],
    )
    data = ModelCardData(
        library_name="peft" if form == "adapter" else "transformers",
        pipeline_tag="image-classification" if form == "classifier" else "image-feature-extraction",
        tags=[*TAGS, "lora"],
        license=licence,
        base_model=facts.hub_bases(),
        model_name=title,
        eval_results=eval_results(facts.evaluations),
        mpp=mpp,
        tile_size=tile_size,
    )
    return render_card(
        "adapter",
        data,
        facts,
        form=form,
        base=base.name,
        classes=metrics["classes"],
        width=width,
        pooling=pooling,
        prefix_tokens=prefix_tokens,
        mpp=resolution(mpp),
        tile_size=tile_size,
        train_tiles=metrics["train_tiles"],
        val_tiles=metrics["val_tiles"],
    )


def versions_of(metrics: dict[str, Any]) -> dict[str, str | None]:
    """The lines about versions, of what a recipe has written down of its machine."""
    versions = metrics.get("machine", {}).get("versions", {})
    names = ("python", "hf_pathology", "torch", "transformers")
    return {f"version of {name}": versions.get(name) for name in names}


def losses_of(metrics: dict[str, Any]) -> str:
    """The first and the last."""
    losses = metrics["losses"]
    return f"{losses[0]:.3f} at first, {losses[-1]:.3f} at last" if losses else "not recorded"
