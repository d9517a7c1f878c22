"""What a cross-validation found: the probabilities of every slide from a head that never saw its case, and their scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .intervals import Interval, auc_interval
from .scoring import average_over_cases, load_metric


@dataclass(frozen=True)
class CrossValidation:
    """Out-of-fold probabilities of n slides for C classes, and their scores with the case as the unit.

    Attributes:
        slides, cases, labels: of each slide, (n,).
        classes: the class names, in the order of the columns of `probabilities`.
        fold: int64 (n,), the fold in which each slide was tested.
        probabilities: float64 (n, C), rows sum to 1.
        fold_metrics: accuracy, balanced_accuracy and roc_auc of the cases of each fold.
        auc: ROC-AUC of the cases of all folds together, with its interval (`auc_interval`). It is a little lower than
            the mean over the folds, because heads of different folds are not calibrated against each other.
    """

    slides: list[str]
    cases: list[str]
    labels: list[str]
    classes: list[str]
    fold: np.ndarray
    probabilities: np.ndarray
    fold_metrics: list[dict[str, float]]
    auc: Interval

    @property
    def targets(self) -> np.ndarray:
        """The class index of each slide, int64 (n,), as `auc_difference` and `roc_with_band` take it."""
        return np.array([self.classes.index(label) for label in self.labels], dtype=np.int64)

    @property
    def mean_metrics(self) -> dict[str, float]:
        """The mean of each metric over the folds."""
        return {name: float(np.mean([fold[name] for fold in self.fold_metrics])) for name in self.fold_metrics[0]}

    def to_table(self) -> pd.DataFrame:
        """One row per slide: slide, case, label, fold, and the probability of each class as `prob_<class>`."""
        columns = {"slide": self.slides, "case": self.cases, "label": self.labels, "fold": self.fold}
        return pd.DataFrame(columns | probability_columns(self.classes, self.probabilities))


def score_folds(
    slides: Sequence[str],
    cases: Sequence[str],
    labels: Sequence[str],
    *,
    fold: np.ndarray,
    probabilities: np.ndarray,
    seed: int,
) -> CrossValidation:
    """The scored cross-validation whose slides were tested in `fold` and got `probabilities`.

    Args:
        slides, cases, labels, fold: of each slide, (n,).
        probabilities: (n, C); the columns are the classes in `labels`, sorted by name.
        seed: of the bootstrap.
    """
    classes = sorted(set(labels))
    targets = np.array([classes.index(label) for label in labels])
    metric, fold_metrics = load_metric("classification"), []
    for tested in (np.flatnonzero(fold == number) for number in np.unique(fold)):
        truth, scores = average_over_cases([cases[i] for i in tested], targets[tested], probabilities[tested])
        fold_metrics.append(metric.compute(predictions=scores, references=truth))
    return CrossValidation(
        slides=list(slides),
        cases=list(cases),
        labels=list(labels),
        classes=classes,
        fold=fold,
        probabilities=probabilities,
        fold_metrics=fold_metrics,
        auc=auc_interval(cases, targets, probabilities, seed=seed),
    )


def probability_columns(classes: Sequence[str], probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of `probabilities` (n, C) under the names that our tables give them."""
    return {f"prob_{name}": column for name, column in zip(classes, probabilities.T, strict=True)}
