import json

import numpy as np
import pytest
from safetensors import safe_open

from hf_pathology.tiles.hidden import draw_hidden_blocks, draw_hidden_share


def draw(count, height=14, width=14, shares=(0.0, 0.3), spreads=(0.0, 0.2), seed=0):
    rng = np.random.default_rng(seed)
    return np.stack(
        [draw_hidden_blocks(height, width, draw_hidden_share(shares, spreads, rng), rng) for _ in range(count)]
    )


def test_hidden_share_never_exceeds_the_budget():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.3, 0.5):
        assert max(draw_hidden_blocks(14, 14, share, rng).mean() for _ in range(200)) <= share


def test_half_of_the_views_hide_nothing_and_the_others_a_tenth_to_a_half():
    share = draw(3000).mean(axis=(1, 2))
    assert (share == 0).mean() == pytest.approx(0.5, abs=0.03)
    assert share.mean() == pytest.approx(0.144, abs=0.01)
    assert np.median(share[share > 0]) == pytest.approx(0.30, abs=0.02)


def test_grids_of_other_shapes_and_tiny_ones_are_served():
    assert draw(50, 6, 10).shape == (50, 6, 10)
    assert draw(50, 2, 2, shares=[0.5], spreads=[0.0]).any()


# Mean, standard deviation and share of empty masks of 10,000 masks of the original (ibot/loader.py), per configuration:
# grid, shares, spreads. The goldens hold the same numbers with their quantiles.
ORIGINAL = {
    "r03v02": ((14, 14), [0.3], [0.2], (0.29381, 0.11762, 0.0)),
    "list_0_03": ((14, 14), [0.0, 0.3], [0.0, 0.2], (0.14443, 0.16809, 0.5057)),
    "fixed03": ((14, 14), [0.3], [0.0], (0.29216, 0.00606, 0.0)),
    "r05v01": ((14, 14), [0.5], [0.1], (0.49450, 0.05831, 0.0)),
    "grid6": ((6, 6), [0.3], [0.2], (0.28376, 0.11606, 0.0001)),
    "rect10x20": ((10, 20), [0.2, 0.4], [0.1, 0.1], (0.29449, 0.11587, 0.0)),
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_mean_spread_and_share_of_empty_masks_are_those_of_the_original(name):
    grid, shares, spreads, (mean, std, none) = ORIGINAL[name]
    share = draw(10_000, *grid, shares, spreads).mean(axis=(1, 2))
    assert share.mean() == pytest.approx(mean, abs=0.006)
    assert share.std() == pytest.approx(std, abs=0.006)
    assert (share == 0).mean() == pytest.approx(none, abs=0.015 if len(shares) > 1 else 0.006)


@pytest.mark.parametrize("name", ORIGINAL)
def test_quantiles_and_places_are_those_of_the_original(goldens, name):
    grid, shares, spreads, _ = ORIGINAL[name]
    masks = draw(10_000, *grid, shares, spreads)
    with safe_open(goldens / "05_ibot_mask_stats.safetensors", "numpy") as file:
        levels = json.loads(file.metadata()["meta"])["quantile_levels"]
        quantiles = file.get_tensor(f"output/{name}/quantiles")
        cells = file.get_tensor(f"output/{name}/per_cell_mask_prob")
    ours = np.quantile(masks.mean(axis=(1, 2)), levels)
    inner = [i for i, level in enumerate(levels) if 0.05 <= level <= 0.95 and not (level == 0.5 and len(shares) > 1)]
    np.testing.assert_allclose(ours[inner], quantiles[inner], atol=0.015 + 0.5 / grid[0] / grid[1])
    np.testing.assert_allclose(masks.mean(axis=0), cells, atol=0.025)
