"""Trains a slide classifier on the features of an encoder, and says by cross-validation how good it is.

    accelerate launch recipes/train_mil.py --features DIR --cohort labels.csv --out DIR [--folds 5 --epochs 40 ...]

The head is gated attention (Ilse et al. 2018), another over tiles (`--head dsmil`), or HIPT's over regions (`--head hipt`), trained as HistoSSLscaling does
(Filiot et al. 2023) but for two things: features are standardised, and the number of epochs is fixed, so that nothing is chosen
on the fold that is tested.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from hf_pathology.atomic import write_json
from hf_pathology.errors import UserError, require_at_least
from hf_pathology.evaluation.cross_validation import CrossValidation, score_folds
from hf_pathology.evaluation.intervals import accuracy_interval
from hf_pathology.evaluation.splits import stratified_case_folds
from hf_pathology.features.bags import draw_batch, read_labelled_bags, tiles_of
from hf_pathology.features.encoder import revision_of
from hf_pathology.features.store import SlideFeatures
from hf_pathology.hub_upload.cards.card import Base, CardOptions
from hf_pathology.hub_upload.cards.cost import cost_of_seconds
from hf_pathology.hub_upload.cards.head_cards import head_card
from hf_pathology.recipes.predict_slides import class_probabilities, write_table
from hf_pathology.recipes.slide_heads import HeadOptions, new_head, region_tiles_of, save_head
from hf_pathology.training.config import parse_config
from hf_pathology.training.machine import machine_of
from hf_pathology.training.start import run_recipe


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadTraining:
    """How a head is trained: Adam on batches of padded bags, with a fresh draw of tiles from each bag in each epoch."""

    epochs: int = field(default=40, metadata={"help": "passes over the bags"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of Adam, constant"})
    weight_decay: float = field(default=0.0, metadata={"help": "of Adam"})
    batch_size: int = field(default=16, metadata={"help": "bags in a step"})
    max_tiles: int = field(default=1000, metadata={"help": "tiles drawn from a bag in an epoch, or regions"})
    seed: int = field(default=0, metadata={"help": "of the folds, of the head's first weights, and of the draws"})

    def __post_init__(self) -> None:
        require_at_least(1, epochs=self.epochs, batch_size=self.batch_size, max_tiles=self.max_tiles)


DEFAULT_TRAINING = HeadTraining()
DEFAULT_HEAD = HeadOptions()
DEFAULT_CARD = CardOptions()


@dataclass(frozen=True)
class MilResult:
    """The head trained on all labelled slides, how such heads do on unseen ones, and what was left out and why."""

    head: PreTrainedModel
    validation: CrossValidation
    missing: list[str]


def train_mil(
    features_dir: str | Path,
    cohort: str | Path,
    out: str | Path,
    *,
    folds: int = 5,
    training: HeadTraining = DEFAULT_TRAINING,
    options: HeadOptions = DEFAULT_HEAD,
    card: CardOptions = DEFAULT_CARD,
) -> MilResult:
    """Cross-validates, trains the final head on every labelled slide, and writes both to the folder `out`.

    Writes `head/` (loads with `AutoModel.from_pretrained`; with its card), `predictions.csv` (out of fold) and `metrics.json`.

    Args:
        features_dir: a folder that `hf-pathology embed` filled.
        cohort: a CSV with the columns slide, label, and optionally case; slides without a label are not used.
        folds: no more than the rarest class has cases.
        options: which head.
        card: what its card is to say of licence and energy.

    Raises UserError for mistakes in the table, and under a launcher with several processes.
    """
    accelerator, began = one_process(), time.monotonic()
    device = accelerator.device
    data = read_labelled_bags(features_dir, cohort)
    how = {"training": training, "options": options, "device": device}
    validation = cross_validate(data.bags, data.labels, data.cases, folds=folds, **how)
    head = train_head(data.bags, data.labels, **how)

    out = Path(out)
    correct = validation.probabilities.argmax(axis=1) == validation.targets
    metrics = {
        "auc": asdict(validation.auc),
        "accuracy": asdict(accuracy_interval(validation.cases, correct, seed=training.seed)),  # of slides
        "mean_over_folds": validation.mean_metrics,
        "folds": validation.fold_metrics,
        "slides": {name: data.labels.count(name) for name in validation.classes},
        "cases": len(set(data.cases)),
        "features": {name: getattr(data.bags[0], name) for name in ("encoder", "revision", "pooling", "size", "mpp")},
        "training": asdict(training),
        "head": {name: value for name, value in asdict(options).items() if value},
        "missing": data.missing,
        "seconds": time.monotonic() - began,  # of the folds and of the final head
        "machine": machine_of(accelerator),
    }
    cost = cost_of_seconds(metrics["seconds"], metrics["machine"], out, card)
    regions = (
        None if options.region_encoder is None else Base(options.region_encoder, revision_of(options.region_encoder))
    )
    save_head(head, out / "head", head_card(head, metrics, cost=cost, licence=card.licence, region_encoder=regions))
    write_table(validation.to_table(), out / "predictions.csv")
    write_json(out / "metrics.json", metrics)
    return MilResult(head, validation, data.missing)


def cross_validate(
    bags: Sequence[SlideFeatures],
    labels: Sequence[str],
    cases: Sequence[str],
    *,
    folds: int = 5,
    training: HeadTraining = DEFAULT_TRAINING,
    options: HeadOptions = DEFAULT_HEAD,
    device: torch.device | str = "cpu",
) -> CrossValidation:
    """The out-of-fold probabilities of every slide, from heads trained on the other cases.

    Any vectors can be compared in this way: `dataclasses.replace(bag, features=colours, encoder="mean colour")`.
    Two calls with the same labels, cases and seed use the same folds, so that their AUCs can be paired.
    """
    fold_of = np.zeros(len(bags), np.int64)
    probabilities = np.zeros((len(bags), len(set(labels))))
    for fold, (train, test) in enumerate(stratified_case_folds(cases, labels, folds, training.seed)):
        head = train_head(
            [bags[i] for i in train], [labels[i] for i in train], training=training, options=options, device=device
        )
        fold_of[test] = fold
        probabilities[test] = class_probabilities(head, [bags[i] for i in test])
        logger.info("fold %d of %d: trained on %d slides, tested on %d", fold + 1, folds, len(train), len(test))
    slides = [bag.slide for bag in bags]
    return score_folds(slides, cases, labels, fold=fold_of, probabilities=probabilities, seed=training.seed)


def train_head(
    bags: Sequence[SlideFeatures],
    labels: Sequence[str],
    *,
    training: HeadTraining = DEFAULT_TRAINING,
    options: HeadOptions = DEFAULT_HEAD,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """A head for the classes in `labels`, sorted by name, that knows what its features are; in evaluation mode."""
    classes = sorted(set(labels))
    targets = torch.tensor([classes.index(label) for label in labels])
    tiles = [tiles_of(bag, region_tiles_of(options, bag)) for bag in bags]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        head = new_head(options, bags[0], tiles, classes).to(device).train()
        trained = [weight for weight in head.parameters() if weight.requires_grad]
        optimizer = torch.optim.Adam(trained, training.learning_rate, weight_decay=training.weight_decay)
        for _ in range(training.epochs):
            for batch in torch.randperm(len(bags)).split(training.batch_size):
                features, mask = draw_batch([tiles[i] for i in batch], training.max_tiles)
                loss = head(features.to(device), mask.to(device), labels=targets[batch].to(device)).loss
                if not loss.isfinite():
                    raise UserError(
                        f"the loss became {loss.item()}: lower the learning rate, {training.learning_rate}"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return head.eval()


def one_process() -> Accelerator:
    """The accelerator of the only process. Raises UserError when there are several."""
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError("a head trains in a minute on one device: launch with --num_processes 1")
    return accelerator


@dataclass(frozen=True)
class Arguments:
    """The command line, beside `HeadTraining`."""

    features: Path = field(metadata={"help": "folder of slide features"})
    cohort: Path = field(metadata={"help": "CSV with the columns slide, label and optionally case"})
    out: Path = field(metadata={"help": "folder to write to"})
    folds: int = field(default=5, metadata={"help": "of the cross-validation"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments, training, options, card = parse_config(Arguments, HeadTraining, HeadOptions, CardOptions, argv=argv)
    result = train_mil(
        arguments.features,
        arguments.cohort,
        arguments.out,
        folds=arguments.folds,
        training=training,
        options=options,
        card=card,
    )
    print(f"ROC-AUC of unseen cases {result.validation.auc}: {arguments.out}")
    if result.missing:
        raise UserError("\n".join(result.missing))


if __name__ == "__main__":
    run_recipe(main)
