"""The shipped `evaluate` metric loads from disk and agrees with scikit-learn; a case is one observation."""

import socket

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from hf_pathology.errors import UserError
from hf_pathology.evaluation.cross_validation import score_folds
from hf_pathology.evaluation.scoring import average_over_cases, load_metric


def scores(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) with unequal classes, and probabilities (n, C) that know a little of them."""
    generator = np.random.default_rng(seed)
    labels = np.minimum(generator.integers(0, classes + 1, n), classes - 1)
    logits = generator.normal(size=(n, classes)) + np.eye(classes)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_metric_agrees_with_scikit_learn(classes):
    labels, probabilities = scores(60, classes, seed=0)
    result = load_metric("classification").compute(predictions=probabilities, references=labels)
    predicted = probabilities.argmax(axis=1)
    ranked = probabilities[:, 1] if classes == 2 else probabilities
    assert result == pytest.approx(
        {
            "accuracy": accuracy_score(labels, predicted),
            "balanced_accuracy": balanced_accuracy_score(labels, predicted),
            "roc_auc": roc_auc_score(labels, ranked, multi_class="ovr"),
        },
        abs=1e-12,
    )


def test_the_metric_loads_without_a_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert (
        load_metric("classification").compute(predictions=[[0.9, 0.1], [0.2, 0.8]], references=[0, 1])["roc_auc"] == 1
    )


def test_the_metric_gathers_batches_as_evaluate_metrics_do():
    labels, probabilities = scores(20, 2, seed=1)
    metric = load_metric("classification")
    for half in (slice(0, 10), slice(10, 20)):
        metric.add_batch(predictions=probabilities[half], references=labels[half])
    assert metric.compute() == metric.compute(predictions=probabilities, references=labels)


def test_a_class_without_an_item_is_refused_by_number():
    with pytest.raises(ValueError, match="class 2 has no item"):
        load_metric("classification").compute(predictions=[[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]], references=[0, 1])


def test_an_unknown_metric_is_refused_with_those_that_are_shipped():
    with pytest.raises(ValueError, match="shipped are classification"):
        load_metric("survival")


def test_a_case_answers_with_the_mean_of_its_slides():
    probabilities = np.array([[0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    labels, means = average_over_cases(["b", "a", "b"], [1, 0, 1], probabilities)
    assert labels.tolist() == [1, 0]
    np.testing.assert_allclose(means, [[0.6, 0.4], [0.3, 0.7]])


def test_a_case_with_two_labels_has_no_answer():
    with pytest.raises(UserError, match="case a has the labels 0 and 1"):
        average_over_cases(["a", "a"], [0, 1], np.ones((2, 2)) / 2)


def test_a_cross_validation_is_scored_by_case_in_each_fold_and_over_all():
    labels = ["b", "a", "b", "a", "a", "b", "a", "b", "b"]
    cases = ["p1", "p2", "p3", "p4", "p5", "p6", "p7", "p8", "p8"]
    fold = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    right = np.array([0.9, 0.8, 0.4, 0.7, 0.6, 0.7, 0.8, 0.1, 0.95])  # of p8, one slide is wrong but the mean is right
    in_b = np.where(np.array(labels) == "b", right, 1 - right)
    result = score_folds("ABCDEFGHI", cases, labels, fold=fold, probabilities=np.stack([1 - in_b, in_b], 1), seed=0)
    assert [metrics["accuracy"] for metrics in result.fold_metrics] == [0.75, 1.0]
    assert result.mean_metrics == {"accuracy": 0.875, "balanced_accuracy": 0.875, "roc_auc": 1.0}
    assert result.auc.value == 1.0 - 0.5 / 16  # p3, in b by 0.4, and p5, in b by 0.4, are a tie that counts half
    assert result.targets.tolist() == [1, 0, 1, 0, 0, 1, 0, 1, 1]
    assert list(result.to_table().columns) == ["slide", "case", "label", "fold", "prob_a", "prob_b"]
