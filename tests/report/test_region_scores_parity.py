"""Our hierarchical heat maps have the values of the original's (see `tests/originals.py`)."""

import numpy as np
import pytest
import torch
from hipt_originals import hipt_model
from originals import FIXTURES, Case, read_case

from hf_pathology.report.region_attention import region_attention
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


def drawn_region(seed: int) -> np.ndarray:
    """The region of the golden heat maps, from integers, uint8 (4096, 4096, 3)."""
    y, x = np.mgrid[:4096, :4096].astype(np.int64)
    channels = [
        (x * (3 + c) + y * (5 - c)) // 7 + ((x // 64) * 37 + (y // 64) * 91) * (c + 1) + ((x * y) >> (6 + c)) + seed
        for c in range(3)
    ]
    return (np.stack(channels, axis=-1) % 256).astype(np.uint8)


@pytest.mark.slow
@torch.no_grad()
def test_from_pixels_to_maps_as_the_original(scores, goldens):
    region = drawn_region(scores.meta["region_seed_term"])
    assert region.astype(np.int64).sum(axis=(0, 1)).tolist() == scores.output["region_check_sums"].tolist()
    np.testing.assert_array_equal(region[-8:, -8:], scores.output["region_corner_8x8x3"])
    model = hipt_model(
        read_case(FIXTURES / "07_hipt_weights.safetensors").state, scores.meta["vit256"], scores.meta["vit4k"]
    )
    found = region_attention(
        model, region, lambda pixels: (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    )
    blend = read_case(goldens / "07_hipt_heatmap_blend.safetensors").output
    for head in (0, 2):
        assert np.abs(found.regions.scores[head] - scores.output[f"score4k_head{head}"].numpy()).mean() < 1e-3
    for head in HEADS:
        assert np.abs(found.tiles.scores[head] - scores.output[f"score256_head{head}"].numpy()).mean() < 1e-3
    for one, other in ((0, 0), (2, 4)):
        assert (
            np.abs(found.maps(one, other)["factorised"] - blend[f"blend_4khead{one}_256head{other}"].numpy()).mean()
            < 1e-3
        )
