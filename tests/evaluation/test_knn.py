"""Weighted nearest neighbours: DINO's own numbers, a naive loop, and what must not matter."""

import re

import numpy as np
import pytest
import torch
from originals import cases

from hf_pathology.errors import UserError
from hf_pathology.evaluation import knn
from hf_pathology.evaluation.knn import weighted_knn


def draw(train=60, test=25, dim=8, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(train + test, dim, generator=generator)
    labels = torch.randint(classes, (train,), generator=generator)
    return features[:train], labels, features[train:]


@pytest.mark.parametrize("case", cases("15_dino_knn"), indirect=True)
def test_predictions_and_accuracies_are_those_of_dino(case):
    given, checked = case.input, 0
    for name, expected in case.output.items():
        found = re.fullmatch(r"pred_ranking_k(\d+)_T([\d.]+)", name)
        if not found:
            continue
        k, temperature = int(found[1]), float(found[2])
        votes = weighted_knn(
            given["train_features"],
            given["train_labels"],
            given["test_features"],
            k=k,
            temperature=temperature,
            classes=case.meta["num_classes"],
        )
        ranking = votes.sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(ranking[:, 0], expected[:, 0])
        assert torch.equal(votes.argmax(dim=1), expected[:, 0])
        right = ranking == given["test_labels"][:, None]
        accuracies = torch.stack([right[:, : min(ranks, k)].any(dim=1).double().mean() for ranks in (1, 5)])
        torch.testing.assert_close(100 * accuracies, case.output[f"top1_top5_k{k}_T{found[2]}"], rtol=0, atol=1e-9)
        checked += 1
    assert checked == 5


def test_votes_are_those_of_a_naive_loop(monkeypatch):
    monkeypatch.setattr(knn, "CHUNK", 7)
    train, labels, test = draw()
    votes = weighted_knn(train, labels, test, k=9, temperature=0.2)
    for i, tile in enumerate(test.double()):
        similarity = [float(tile @ each / tile.norm() / each.norm()) for each in train.double()]
        nearest = sorted(range(len(train)), key=lambda j: -similarity[j])[:9]
        expected = np.zeros(4)
        for j in nearest:
            expected[labels[j]] += np.exp(similarity[j] / 0.2)
        np.testing.assert_allclose(votes[i], expected / expected.sum(), atol=1e-6)


def test_the_length_of_features_and_the_kind_of_array_do_not_matter():
    train, labels, test = draw()
    votes = weighted_knn(train, labels, test)
    lengths = torch.rand(len(train), 1) * 100 + 1e-2
    scaled = weighted_knn((train * lengths).numpy().astype(np.float64), labels.numpy(), (test * 3).numpy())
    torch.testing.assert_close(scaled, votes, atol=1e-5, rtol=0)


def test_a_small_temperature_does_not_overflow_and_leaves_the_nearest():
    train, labels, test = draw()
    votes = weighted_knn(train, labels, test, temperature=1e-3)
    assert torch.isfinite(votes).all()
    assert torch.equal(votes.argmax(dim=1), weighted_knn(train, labels, test, k=1).argmax(dim=1))


def test_a_class_without_a_neighbour_has_no_vote():
    train, labels, test = draw(classes=3)
    votes = weighted_knn(train, labels, test, k=5, classes=6)
    assert votes.shape == (25, 6)
    assert (votes[:, 3:] == 0).all()
    torch.testing.assert_close(votes.sum(dim=1), torch.ones(25))


def test_more_neighbours_than_tiles_and_broken_features_are_refused():
    train, labels, test = draw(train=10)
    with pytest.raises(UserError, match="k is 20 and there are 10 labelled tiles"):
        weighted_knn(train, labels, test)
    test[3, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        weighted_knn(train, labels, test, k=5)
