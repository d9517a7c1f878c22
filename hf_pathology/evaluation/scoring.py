"""Scores of class probabilities by the shipped `evaluate` metrics, with the case as the unit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .splits import label_of_cases


METRICS = Path(__file__).parent / "metrics"


def load_metric(name: str = "classification") -> Any:
    """The `evaluate.Metric` shipped as `metrics/<name>/<name>.py`, loaded from disk without a network.

    `import evaluate` takes some 5 seconds, so it waits until a score is wanted. Raises ValueError for an unknown name.
    """
    import evaluate

    shipped = sorted(path.parent.name for path in METRICS.glob("*/*.py"))
    if name not in shipped:
        raise ValueError(f"there is no metric {name!r}: shipped are {', '.join(shipped)}")
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


def average_over_cases(
    cases: Sequence[str], labels: Sequence[int], probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The labels (n_cases,) and mean probabilities (n_cases, C) of the cases, in order of appearance.

    A case is one observation, however many slides were cut from it: the mean over its slides is its answer.

    Args:
        cases: the case of each slide.
        labels: class index of each slide, the same for all slides of a case.
        probabilities: (n_slides, C).
    """
    label_of = label_of_cases(cases, labels)
    names = np.asarray(cases)
    means = [probabilities[names == case].mean(axis=0) for case in label_of]
    return np.array(list(label_of.values()), dtype=np.int64), np.stack(means)
