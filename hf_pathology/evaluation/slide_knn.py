"""How well slides' nearest neighbours say their class: what a slide's embedding is worth without training anything.

As HIPT evaluates it (Chen et al. 2022, arXiv 2206.02647, table 2): five neighbours by Euclidean distance, each with one
vote, the area under the ROC curve of the shares of the votes, over folds. Its embeddings are means over regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from ..errors import UserError
from .splits import stratified_case_folds


@dataclass(frozen=True)
class SlideKnn:
    """What the neighbours said.

    Attributes:
        aucs: the area under the ROC curve in each fold, macro-averaged over one-against-the-rest for more than two classes.
        classes: names, in the order of the votes.
        votes: float64 (slides, classes), the shares of the votes for each slide when it was asked for.
        folds: of each slide, in which it was asked for.
    """

    aucs: tuple[float, ...]
    classes: tuple[str, ...]
    votes: np.ndarray
    folds: np.ndarray

    def __str__(self) -> str:
        return f"{np.mean(self.aucs):.3f} +- {np.std(self.aucs):.3f} over {len(self.aucs)} folds"


def slide_knn(
    embeddings: np.ndarray, labels: Sequence[str], cases: Sequence[str], *, folds: int = 10, seed: int = 0, k: int = 5
) -> SlideKnn:
    """Asks for the class of each slide the `k` nearest slides of other cases, in `folds` folds by case.

    Args:
        embeddings: of slides, (S, D); not normalised, as published.
        labels: the class of each slide.
        cases: the case of each slide; slides of one case are never neighbours.

    Raises UserError when there are too few cases for the folds, or too few slides for `k`.
    """
    classes = sorted(set(labels))
    targets = np.array([classes.index(label) for label in labels])
    votes, asked_in, aucs = np.zeros((len(labels), len(classes))), np.zeros(len(labels), int), []
    for fold, (known, asked) in enumerate(stratified_case_folds(cases, labels, folds, seed)):
        if len(known) < k:
            raise UserError(
                f"{len(known)} slides to look among are fewer than k, {k}: use more slides, or a smaller k"
            )
        votes[asked] = neighbour_votes(embeddings[known], targets[known], embeddings[asked], k, len(classes))
        asked_in[asked] = fold
        aucs.append(fold_auc(targets[asked], votes[asked]))
    return SlideKnn(tuple(aucs), tuple(classes), votes, asked_in)


def neighbour_votes(known: np.ndarray, targets: np.ndarray, asked: np.ndarray, k: int, classes: int) -> np.ndarray:
    """The share of the votes of the `k` nearest of `known` (n, D) with class indices `targets`, float64 (m, classes)."""
    found = KNeighborsClassifier(k).fit(known, targets)
    votes = np.zeros((len(asked), classes))
    votes[:, found.classes_] = found.predict_proba(asked)
    return votes


def fold_auc(targets: np.ndarray, votes: np.ndarray) -> float:
    """The area under the ROC curve of one fold, of the second of two classes or the mean over all of more."""
    if votes.shape[1] == 2:
        return float(roc_auc_score(targets, votes[:, 1]))
    return float(roc_auc_score(targets, votes, multi_class="ovr"))
