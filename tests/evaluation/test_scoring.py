"""The shipped `evaluate` metric loads from disk and agrees with scikit-learn; a case is one observation."""

import socket

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from hf_pathology.errors import UserError
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
