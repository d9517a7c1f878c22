"""Folds by case: nobody is on both sides, every class is on both, and impossible demands are refused by name."""

import numpy as np
import pytest

from hf_pathology.errors import UserError
from hf_pathology.evaluation.splits import stratified_case_folds


def cohort(seed: int) -> tuple[list[str], list[str]]:
    """30 cases of 1 to 6 slides, three classes of 5, 10 and 15 cases, in random order."""
    generator = np.random.default_rng(seed)
    label_of = ["rare"] * 5 + ["some"] * 10 + ["many"] * 15
    slides = [(f"case{i}", label) for i, label in enumerate(label_of) for _ in range(generator.integers(1, 7))]
    order = generator.permutation(len(slides))
    return [slides[i][0] for i in order], [slides[i][1] for i in order]


@pytest.mark.parametrize("seed", range(5))
def test_no_case_is_on_both_sides_and_every_slide_is_tested_once(seed):
    cases, labels = cohort(seed)
    folds = stratified_case_folds(cases, labels, 5, seed)
    for train, test in folds:
        assert not {cases[i] for i in train} & {cases[i] for i in test}
        assert len(train) + len(test) == len(cases)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(len(cases)))


@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_on_both_sides_even_with_as_many_folds_as_it_has_cases(seed):
    cases, labels = cohort(seed)
    for train, test in stratified_case_folds(cases, labels, 5, seed):
        assert {labels[i] for i in train} == {labels[i] for i in test} == {"rare", "some", "many"}


def test_the_seed_decides_the_folds():
    cases, labels = cohort(0)
    first, again, other = (stratified_case_folds(cases, labels, 5, seed)[0][1].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_a_label_with_one_case_is_refused_by_name():
    cases, labels = ["a", "b", "c", "d", "d"], ["normal", "normal", "normal", "tumour", "tumour"]
    with pytest.raises(UserError, match="label tumour has only 1 case: 2 folds need 2"):
        stratified_case_folds(cases, labels, 2, seed=0)


def test_a_case_with_two_labels_is_refused_by_name():
    with pytest.raises(UserError, match="case b has the labels normal and tumour"):
        stratified_case_folds(["a", "b", "b"], ["normal", "normal", "tumour"], 2, seed=0)


def test_one_class_or_one_fold_cannot_be_cross_validated():
    with pytest.raises(UserError, match="all slides have the label normal"):
        stratified_case_folds(["a", "b"], ["normal", "normal"], 2, seed=0)
    with pytest.raises(UserError, match="1 folds cannot be cross-validated"):
        stratified_case_folds(["a", "b"], ["normal", "tumour"], 1, seed=0)
