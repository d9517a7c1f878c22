"""Bootstrap intervals: they cover what is known, pair what is paired, and treat a case as one observation."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from hf_pathology.errors import UserError
from hf_pathology.evaluation.intervals import (
    accuracy_difference,
    accuracy_interval,
    auc_difference,
    auc_interval,
    roc_with_band,
)


def cohort(n: int, shift: float, seed: int, classes: int = 2) -> tuple[list[str], np.ndarray, np.ndarray]:
    """`n` cases of one slide; with two classes the score is N(0, 1) or N(shift, 1), so AUC is Phi(shift / sqrt 2)."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    scores = generator.normal(size=(n, classes)) + shift * np.eye(classes)[labels]
    if classes == 2:
        scores[:, 1] = generator.normal(size=n) + shift * labels
        scores[:, 0] = -scores[:, 1]
    return [f"case{i}" for i in range(n)], labels, scores


@pytest.mark.parametrize("classes", [2, 3])
def test_the_value_is_scikit_learns_auc_ties_included(classes):
    cases, labels, scores = cohort(61, 0.8, seed=0, classes=classes)
    scores = scores.round(0)
    one_against_rest = [roc_auc_score(labels == c, scores[:, c]) for c in range(classes)]
    expected = one_against_rest[1] if classes == 2 else np.mean(one_against_rest)
    assert auc_interval(cases, labels, scores, seed=0).value == pytest.approx(expected, abs=1e-12)


def test_intervals_cover_the_known_auc_as_often_as_they_say():
    truth = norm.cdf(1.0 / np.sqrt(2))
    intervals = [auc_interval(*cohort(80, 1.0, seed), seed=seed, confidence=0.9, resamples=400) for seed in range(100)]
    covered = sum(interval.low <= truth <= interval.high for interval in intervals)
    assert 82 <= covered <= 97


def test_the_width_is_that_of_hanley_and_mcneil():
    cases, labels, scores = cohort(300, 1.0, seed=3)
    interval = auc_interval(cases, labels, scores, seed=0)
    auc, n = interval.value, 150
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (n - 1) * (q2 - auc**2)) / n**2
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.15)


def test_the_seed_decides_the_interval():
    data = cohort(40, 1.0, seed=0)
    assert auc_interval(*data, seed=1) == auc_interval(*data, seed=1) != auc_interval(*data, seed=2)


def test_slides_of_a_case_are_one_observation():
    cases, labels, scores = cohort(40, 1.0, seed=0)
    once = auc_interval(cases, labels, scores, seed=0)
    ten_times = auc_interval(cases * 10, np.tile(labels, 10), np.tile(scores, (10, 1)), seed=0)
    assert (ten_times.low, ten_times.high) == pytest.approx((once.low, once.high))


def test_the_difference_of_identical_scores_is_exactly_zero():
    cases, labels, scores = cohort(50, 1.0, seed=0, classes=3)
    difference = auc_difference(cases, labels, scores, scores.copy(), seed=0)
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_pairing_makes_the_difference_of_correlated_scores_sharper():
    cases, labels, scores = cohort(200, 1.0, seed=0)
    nearly = scores + 0.1 * np.random.default_rng(1).normal(size=scores.shape)
    paired = auc_difference(cases, labels, scores, nearly, seed=0)
    alone = auc_interval(cases, labels, scores, seed=0)
    assert paired.low < 0 < paired.high
    assert paired.high - paired.low < 0.25 * (alone.high - alone.low)


def test_a_better_score_has_a_difference_above_zero():
    cases, labels, good = cohort(200, 2.0, seed=0)
    _, _, poor = cohort(200, 0.2, seed=1)
    assert auc_difference(cases, labels, good, poor, seed=0).low > 0


def test_perfectly_separated_cases_have_no_width():
    labels, scores = np.array([0, 0, 1, 1]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert str(auc_interval(list("abcd"), labels, scores, seed=0)) == "1.000 [1.000, 1.000]"


def test_a_class_with_one_case_has_no_interval():
    with pytest.raises(UserError, match="class 1 has 1 of 3 cases"):
        auc_interval(list("aabc"), [0, 0, 0, 1], np.ones((4, 2)) / 2, seed=0)


def test_the_roc_band_runs_from_corner_to_corner_around_its_curve():
    cases, labels, scores = cohort(100, 1.0, seed=0)
    band = roc_with_band(cases, labels, scores, seed=0)
    assert (band.fpr[0], band.tpr[0], band.fpr[-1], band.tpr[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert (band.low <= band.tpr).all() and (band.tpr <= band.high).all()
    assert (np.diff(band.tpr) >= 0).all()
    area = np.trapezoid(band.tpr, band.fpr)
    assert area == pytest.approx(auc_interval(cases, labels, scores, seed=0).value, abs=0.02)


def test_the_roc_curve_of_one_of_three_classes_is_against_the_rest():
    cases, labels, scores = cohort(90, 1.0, seed=0, classes=3)
    band = roc_with_band(cases, labels, scores, positive=2, seed=0)
    assert np.trapezoid(band.tpr, band.fpr) == pytest.approx(roc_auc_score(labels == 2, scores[:, 2]), abs=0.02)


def tiles(n_groups: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The groups of 6 tiles each, and which are right: with a chance of its own for each group, around 0.8."""
    generator = np.random.default_rng(seed)
    chances = np.clip(generator.normal(0.8, spread, n_groups), 0, 1)
    groups = np.repeat([f"g{i}" for i in range(n_groups)], 6)
    return groups, generator.random(6 * n_groups) < np.repeat(chances, 6)


def test_accuracy_intervals_are_those_of_a_loop_that_draws_groups_with_all_their_tiles():
    groups, correct = tiles(40, 0.2, seed=0)
    groups, correct = groups[:-4], correct[:-4]  # groups of different size
    members = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    generator, drawn = np.random.default_rng(1), []
    for _ in range(4000):
        rows = np.concatenate([members[i] for i in generator.integers(len(members), size=len(members))])
        drawn.append(correct[rows].mean())
    interval = accuracy_interval(groups, correct, seed=0, resamples=4000)
    assert interval.value == correct.mean()
    assert (interval.low, interval.high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.006)


def test_accuracy_intervals_cover_the_known_accuracy_though_tiles_of_a_group_are_alike():
    covered = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        correct = np.repeat(generator.random(60) < 0.7, 6)  # a group is wholly right or wholly wrong
        groups = np.repeat(np.arange(60).astype(str), 6)
        interval = accuracy_interval(groups, correct, seed=seed, confidence=0.9, resamples=400)
        covered += interval.low <= 0.7 <= interval.high
    assert 82 <= covered <= 97


def test_copies_of_a_tile_within_its_group_do_not_sharpen_its_accuracy():
    groups, correct = tiles(30, 0.2, seed=0)
    once = accuracy_interval(groups, correct, seed=0)
    ten_times = accuracy_interval(np.tile(groups, 10), np.tile(correct, 10), seed=0)
    assert (ten_times.low, ten_times.high) == pytest.approx((once.low, once.high))


def test_the_difference_of_accuracies_is_paired():
    groups, correct = tiles(60, 0.3, seed=0)
    others = correct.copy()
    others[::30] = False
    same = accuracy_difference(groups, correct, correct.copy(), seed=0)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    better = accuracy_difference(groups, correct, others, seed=0)
    alone = accuracy_interval(groups, correct, seed=0)
    assert better.value == pytest.approx(correct.mean() - others.mean())
    assert better.low > 0
    assert better.high - better.low < 0.5 * (alone.high - alone.low)


def test_one_group_has_no_interval_of_accuracy():
    with pytest.raises(UserError, match="all tiles are of one group, a"):
        accuracy_interval(["a", "a"], [True, False], seed=0)
