"""How sure a ROC-AUC or an accuracy is, and the difference of two: bootstrap intervals over cases, or groups of tiles.

The functions for ROC-AUC take one row per slide and reduce it to one row per case first (the mean over its slides),
because slides of one patient are not independent. Cases are then resampled within their class, so that no resample lacks
one. Those for accuracy take one row per tile and resample whole groups, each with all its tiles. Intervals are
percentiles, which stay within [0, 1] (Efron and Tibshirani 1993, chapter 13).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, rankdata
from sklearn.metrics import roc_curve

from ..errors import UserError
from .scoring import average_over_cases


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval [low, high] at the given confidence."""

    value: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class RocBand:
    """A ROC curve over a grid: arrays (G,) of false positive rates, of true positive rates, and of their band."""

    fpr: np.ndarray
    tpr: np.ndarray
    low: np.ndarray
    high: np.ndarray


def auc_interval(
    cases: Sequence[str],
    labels: Sequence[int],
    probabilities: np.ndarray,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """The ROC-AUC of the cases with its interval; the mean over the classes against the rest when there are several.

    Perfectly separated cases give [1, 1]: resampling cannot show the mistakes that a larger cohort would.

    Args:
        cases: the case of each slide.
        labels: class index of each slide, 0 to C - 1.
        probabilities: (n_slides, C).

    Raises UserError when a class has fewer than two cases.
    """
    labels, scores = average_over_cases(cases, labels, probabilities)
    rows = rows_of_classes(labels, scores.shape[1])
    return _interval(lambda *resampled: auc_of_rows(scores, resampled), rows, seed, confidence, resamples)


def auc_difference(
    cases: Sequence[str],
    labels: Sequence[int],
    probabilities: np.ndarray,
    others: np.ndarray,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """The ROC-AUC of `probabilities` minus that of `others`, with its interval.

    The two are paired: both see the same cases in every resample. Arguments and errors are those of `auc_interval`.
    """
    case_labels, scores = average_over_cases(cases, labels, probabilities)
    _, other_scores = average_over_cases(cases, labels, others)
    rows = rows_of_classes(case_labels, scores.shape[1])

    def difference(*resampled: np.ndarray) -> np.ndarray:
        return auc_of_rows(scores, resampled) - auc_of_rows(other_scores, resampled)

    return _interval(difference, rows, seed, confidence, resamples)


def roc_with_band(
    cases: Sequence[str],
    labels: Sequence[int],
    probabilities: np.ndarray,
    *,
    positive: int = 1,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 500,
) -> RocBand:
    """The ROC curve of class `positive` against the rest, with a pointwise band, over 101 false positive rates.

    Arguments and errors are those of `auc_interval`.
    """
    labels, scores = average_over_cases(cases, labels, probabilities)
    is_positive = labels == positive
    rows = rows_of_classes(is_positive.astype(np.int64), 2)
    fpr = np.linspace(0.0, 1.0, 101)

    def curve(*resampled: np.ndarray) -> np.ndarray:
        chosen = np.concatenate(resampled)
        rates = roc_curve(is_positive[chosen], scores[chosen, positive])
        return np.where(fpr > 0, np.interp(fpr, rates[0], rates[1]), 0.0)  # (101,), from the corner (0, 0)

    result = bootstrap(
        rows,
        curve,
        n_resamples=resamples,
        vectorized=False,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return RocBand(fpr, curve(*rows), result.confidence_interval.low, result.confidence_interval.high)


def accuracy_interval(
    groups: Sequence[str],
    correct: Sequence[bool],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """The share of tiles that are classified correctly, with its interval.

    Args:
        groups: the group of each tile, what is not independent: the case, or the source image of augmented copies.
        correct: whether each tile was classified correctly.

    Raises UserError when there are fewer than two groups.
    """
    return _mean_over_groups(groups, np.asarray(correct, float), seed, confidence, resamples)


def accuracy_difference(
    groups: Sequence[str],
    correct: Sequence[bool],
    others: Sequence[bool],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """The accuracy that `correct` makes minus that of `others`, on the same tiles, with its interval.

    The two are paired: both see the same groups in every resample. Arguments and errors are those of `accuracy_interval`.
    """
    gained = np.asarray(correct, float) - np.asarray(others, float)
    return _mean_over_groups(groups, gained, seed, confidence, resamples)


def rows_of_classes(labels: np.ndarray, n_classes: int) -> list[np.ndarray]:
    """For each class the rows that belong to it. Raises UserError when a class has fewer than two."""
    rows = [np.flatnonzero(labels == index) for index in range(n_classes)]
    for index, members in enumerate(rows):
        if len(members) < 2:
            raise UserError(f"class {index} has {len(members)} of {len(labels)} cases: an interval needs two of each")
    return rows


def auc_of_rows(scores: np.ndarray, rows: Sequence[np.ndarray]) -> np.ndarray:
    """ROC-AUC (...) of the rows (..., n_c) that were drawn from each class c, by the rank-sum identity.

    The area is the share of pairs of a member and another that the score orders rightly, ties counting half: the
    members' rank sum, less its least value, over the number of pairs (Hanley and McNeil 1982). With two classes it is
    that of the second, with more the mean over the classes.

    Args:
        scores: (n, C).
        rows: for each of the C classes the rows of its members; leading dimensions are resamples.
    """
    drawn = np.concatenate(rows, axis=-1)  # (..., n)
    label_of = np.repeat(np.arange(len(rows)), [members.shape[-1] for members in rows])  # (n,)
    areas = []
    for index in [1] if len(rows) == 2 else range(len(rows)):
        members = label_of == index
        count, others = members.sum(), (~members).sum()
        rank_sum = rankdata(scores[drawn, index], axis=-1)[..., members].sum(axis=-1)  # (...)
        areas.append((rank_sum - count * (count + 1) / 2) / (count * others))
    return np.mean(areas, axis=0)


def _mean_over_groups(
    groups: Sequence[str], values: np.ndarray, seed: int, confidence: float, resamples: int
) -> Interval:
    """The mean of the values of all tiles, with its interval when groups are resampled."""
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise UserError(f"all tiles are of one group, {names[0]}: an interval needs two or more")
    totals, counts = np.bincount(group_of, values), np.bincount(group_of)  # (G,)

    def mean(drawn: np.ndarray) -> np.ndarray:
        return totals[drawn].sum(axis=-1) / counts[drawn].sum(axis=-1)

    return _interval(mean, [np.arange(len(names))], seed, confidence, resamples)


def _interval(
    statistic: Callable[..., np.ndarray], rows: list[np.ndarray], seed: int, confidence: float, resamples: int
) -> Interval:
    """The interval of `statistic`, a function of the rows of each class, when rows are resampled within classes."""
    result = bootstrap(
        rows,
        lambda *resampled, axis: statistic(*resampled),
        n_resamples=resamples,
        batch=100,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(float(statistic(*rows)), float(low), float(high), confidence)
