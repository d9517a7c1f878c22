"""The signs of collapse on features whose kind is known."""

import math

import pytest
import torch

from hf_pathology.modeling.collapse import effective_rank, entropy, feature_std, view_agreement


def test_entropy_is_the_logarithm_of_k_when_uniform_and_zero_when_one_hot():
    assert float(entropy(torch.full((4, 32), 1 / 32))) == pytest.approx(math.log(32))
    assert float(entropy(torch.eye(32))) == 0.0


def test_entropy_is_the_mean_over_distributions():
    probabilities = torch.stack([torch.full((8,), 1 / 8), torch.eye(8)[0]])
    assert float(entropy(probabilities)) == pytest.approx(math.log(8) / 2)


def test_feature_std_is_one_on_the_whole_sphere_and_zero_at_a_point():
    torch.manual_seed(0)
    assert float(feature_std(torch.randn(5000, 64))) == pytest.approx(1.0, abs=0.02)
    assert float(feature_std(torch.randn(1, 64).expand(50, 64))) == pytest.approx(0.0, abs=1e-6)


def test_feature_std_does_not_depend_on_the_length_of_the_features():
    torch.manual_seed(0)
    features = torch.randn(50, 8)
    assert float(feature_std(features)) == pytest.approx(float(feature_std(7 * features)), rel=1e-5)


def test_effective_rank_counts_equal_directions():
    directions = torch.linalg.qr(torch.randn(16, 5, generator=torch.Generator().manual_seed(0))).Q.T  # (5, 16)
    assert float(effective_rank(torch.cat([directions, -directions]))) == pytest.approx(5.0, rel=1e-4)


def test_effective_rank_is_the_exponential_of_the_entropy_of_the_singular_values():
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    centred = features - features.mean(dim=0)
    singular = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt()
    share = singular / singular.sum()
    assert float(effective_rank(features)) == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-4)


def test_a_common_offset_is_no_dimension():
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    assert float(effective_rank(features + 3)) == pytest.approx(float(effective_rank(features)), rel=1e-4)


def test_equal_features_have_effective_rank_one():
    assert float(effective_rank(torch.ones(8, 4))) == 1.0


def test_views_agree_when_each_tile_is_nearest_to_itself():
    torch.manual_seed(0)
    features = torch.randn(20, 32)
    close = torch.stack([features, features + 0.01 * torch.randn(20, 32)])
    assert float(view_agreement(close)) == 1.0
    assert float(view_agreement(torch.stack([features, features.roll(1, dims=0)]))) == 0.0


def test_collapsed_features_do_not_agree():
    assert float(view_agreement(torch.ones(2, 20, 8))) == pytest.approx(1 / 20)
