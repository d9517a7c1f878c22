"""Our hierarchical heat maps have the values of the original's (see `tests/originals.py`)."""

import numpy as np
import pytest
from originals import Case, read_case

from hf_pathology.report.region_scores import ScoreMap, factorised, region_level_map, tile_level_map


HEADS = (0, 4)  # of the tile level, that are recorded


@pytest.fixture(scope="module")
def case(goldens) -> Case:
    return read_case(goldens / "07_hipt_heatmap_inputs.safetensors")


@pytest.fixture(scope="module")
def scores(goldens) -> Case:
    return read_case(goldens / "07_hipt_heatmap_scores.safetensors")


@pytest.fixture(scope="module")
def maps(case, scores) -> tuple[ScoreMap, ScoreMap]:
    """Of the region level and of the tile level."""
    scale, offset = scores.meta["scale"], scores.meta["offset"]
    region = [case.input[f"attn4k_region{k}"].numpy() for k in (1, 2, 3, 4)]
    tiles = []
    for k in (1, 2):
        heads = np.stack([case.input[f"attn256_region{k}_head{head}"].numpy() for head in HEADS], axis=1)
        tiles.append(heads.reshape(16, 16, len(HEADS), 16, 16))
    shift = offset // scale
    return region_level_map(region, 256 // scale, shift), tile_level_map(tiles, 16 // scale, shift)


def test_scores_of_both_levels_are_the_originals(maps, scores):
    region, tiles = maps
    for head in (0, 2):
        np.testing.assert_allclose(region.scores[head], scores.output[f"score4k_head{head}"], atol=1e-6)
    for number, head in enumerate(HEADS):
        np.testing.assert_allclose(tiles.scores[number], scores.output[f"score256_head{head}"], atol=1e-6)
    np.testing.assert_allclose(
        region.scores.sum(axis=(1, 2), dtype=np.float64), scores.output["score4k_sum_all_heads"], rtol=1e-6
    )


def test_factorised_maps_are_the_originals(maps, goldens):
    expected = read_case(goldens / "07_hipt_heatmap_blend.safetensors").output
    for number, (region_head, tile_head) in enumerate(((0, 0), (2, 4))):
        blend = factorised(*maps, region_head, number)
        np.testing.assert_allclose(blend, expected[f"blend_4khead{region_head}_256head{tile_head}"], atol=1e-6)
