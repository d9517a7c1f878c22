"""Slides by their nearest neighbours: HIPT's numbers, and cases that stay together."""

import numpy as np
import pytest
from originals import cases

from hf_pathology.errors import UserError
from hf_pathology.evaluation.slide_knn import fold_auc, neighbour_votes, slide_knn


@pytest.mark.parametrize("case", cases("15_hipt_slide_knn"), indirect=True)
@pytest.mark.parametrize("study", ["tcga_kidney", "tcga_lung"])
def test_each_fold_has_hipts_area_under_the_curve(case, study):
    found = []
    for fold in range(3):
        known, targets, asked, expected = (
            case.input[f"{study}_{part}_{fold}"].numpy() for part in ("train_x", "train_y", "test_x", "test_y")
        )
        votes = neighbour_votes(known, targets, asked, 5, len(np.unique(targets)))
        found.append(fold_auc(expected, votes))
    assert found == pytest.approx(case.output[f"{study}_auc_folds"].tolist(), abs=1e-12)


def test_classes_that_lie_apart_are_told_apart_and_others_are_not():
    rng = np.random.default_rng(0)
    labels = ["a", "b"] * 30
    apart = rng.normal(size=(60, 4)) + 5 * np.array([label == "b" for label in labels])[:, None]
    cases_of = [f"case {number}" for number in range(60)]
    found = slide_knn(apart, labels, cases_of)
    assert found.aucs == (1.0,) * 10 and found.classes == ("a", "b") and str(found) == "1.000 +- 0.000 over 10 folds"
    assert sorted(np.bincount(found.folds)) == [6] * 10
    alike = slide_knn(rng.normal(size=(60, 4)), labels, cases_of)
    assert abs(np.mean(alike.aucs) - 0.5) < 0.2


def test_slides_of_one_case_are_no_neighbours():
    """Each case has five equal slides: were they neighbours, all votes would be right, and now none is better than chance."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(20, 4)).repeat(5, axis=0)
    labels = np.array(["a", "b"])[rng.integers(0, 2, 20)].repeat(5)
    found = slide_knn(embeddings, list(labels), [f"case {number}" for number in range(20) for _ in range(5)], folds=5)
    right = found.votes.argmax(axis=1) == (labels == "b")
    assert right.mean() < 0.75


def test_too_few_slides_are_refused():
    with pytest.raises(UserError, match="4 slides to look among are fewer than k, 5"):
        slide_knn(np.zeros((8, 2)), ["a", "b"] * 4, list("abcdefgh"), folds=2)
