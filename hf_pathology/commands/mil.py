"""`hf-pathology train-mil` and `predict`: slide classifiers on features."""

from dataclasses import asdict
from pathlib import Path

from ..features.bags import feature_keys
from ..hub_upload.cards.card import CardOptions
from ..recipes.predict_slides import predict as predict_slides
from ..recipes.predict_slides import write_table
from ..recipes.slide_heads import HeadOptions
from ..recipes.train_mil import HeadTraining
from ..recipes.train_mil import train_mil as train
from ..record import RunRecord
from ..report.classification import classification_section
from ..report.page import write_report
from ..report.sections import provenance_section


def train_mil(
    *,
    features: Path,
    cohort: Path,
    out: Path,
    folds: int,
    epochs: int,
    seed: int,
    head: str,
    region_encoder: str | None,
    freeze_regions: bool,
    licence: str | None,
) -> int:
    """Cross-validates and trains a head into `out`; returns the exit code."""
    training = HeadTraining(epochs=epochs, seed=seed)
    options, card = HeadOptions(head, region_encoder, freeze_regions), CardOptions(licence=licence)
    asked = {"features": features, "cohort": cohort, "folds": folds, "epochs": epochs}
    record = RunRecord("train-mil", {**asked, **asdict(options)})
    result = train(features, cohort, out, folds=folds, training=training, options=options, card=card)
    for problem in result.missing:
        record.failed(problem)
    for slide, fold in zip(result.validation.slides, result.validation.fold.tolist()):
        record.did(slide, fold=fold)
    record.save(out / "report.json")
    sections = [
        classification_section({"these features": result.validation}, {}),
        provenance_section([record.command_line]),
    ]
    lead = f"{len(record.done)} slides of {len(set(result.validation.cases))} cases, classified by the head {head}."
    write_report(out / "report.html", "Slide classification", lead, sections)
    print(f"ROC-AUC of unseen cases {result.validation.auc}; head: {out / 'head'}; report: {out / 'report.html'}")
    return record.exit_code


def predict(*, head: Path, features: Path, out: Path) -> int:
    """Writes the head's predictions for every slide that has features; returns the exit code."""
    record = RunRecord("predict", {"head": head, "features": features})
    table, missing = predict_slides(head, features, feature_keys(features))
    for problem in missing:
        record.failed(problem)
    write_table(table, out)
    print(f"{len(table)} slides classified: {out}")
    return record.exit_code
