"""Folds for cross-validation that never put two slides of one case on both sides."""

from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from ..errors import UserError


def stratified_case_folds(
    cases: Sequence[str], labels: Sequence[str], n_folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each fold the indices (train, test) of the slides, int64 and sorted; every slide is tested in one fold.

    A case lies wholly on one side, and every class is on both sides of every fold: the cases are dealt one after the
    other to the fold that has least of their class.

    Args:
        cases: the case of each slide.
        labels: the class of each slide, the same for all slides of a case.
        n_folds: at least 2, and no more than the rarest class has cases.
        seed: decides which cases go together.

    Raises UserError when a case has two labels, when there is only one class, or a class has fewer cases than folds.
    """
    label_of = label_of_cases(cases, labels)
    classes, counts = np.unique(list(label_of.values()), return_counts=True)
    if n_folds < 2:
        raise UserError(f"{n_folds} folds cannot be cross-validated: ask for 2 or more")
    if len(classes) < 2:
        raise UserError(f"all slides have the label {classes[0]}: a classifier needs two or more")
    rarest = counts.argmin()
    if counts[rarest] < n_folds:
        raise UserError(
            f"label {classes[rarest]} has only {counted(counts[rarest], 'case')}: {n_folds} folds need {n_folds}; "
            "ask for fewer folds, add cases, or leave the label out"
        )
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    return list(folds.split(np.zeros(len(cases)), np.asarray(labels), np.asarray(cases)))


def label_of_cases(cases: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """The label of each case, in the order in which the cases appear. Raises UserError for a case with two labels."""
    label_of: dict[str, str] = {}
    for case, label in zip(cases, labels, strict=True):
        if label_of.setdefault(case, label) != label:
            raise UserError(
                f"case {case} has the labels {label_of[case]} and {label}: give all its slides one label, "
                "or leave those of the other label out"
            )
    return label_of


def counted(number: int, noun: str) -> str:
    """The number with its noun, "1 case" or "4 cases"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
