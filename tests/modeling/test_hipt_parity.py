"""Our HIPT gives the numbers of the original (see `tests/originals.py`)."""

import pytest
import torch
from hipt_originals import hipt_model, region_model
from originals import FIXTURES, Case, cases, read_case
from torch.testing import assert_close

from hf_pathology.modeling.cls_attention import watch_cls_attention


TILE = {"atol": 2e-5, "rtol": 0}
REGION = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    return read_case(FIXTURES / "07_hipt_weights.safetensors").state


@pytest.mark.parametrize("case", cases("07_hipt_vit4k_grids"), indirect=True)
@torch.no_grad()
def test_the_region_encoder_sees_grids_of_any_shape_as_vit_4k_does(case, weights):
    model = region_model(weights, case.meta["vit4k"])
    for grid, features in case.input.items():
        with watch_cls_attention(model) as noted:
            output = model(features)
        assert_close(output.last_hidden_state, case.output[f"{grid}/tokens"], **REGION)
        assert_close(output.pooler_output, case.output[f"{grid}/cls"], **REGION)
        assert_close(noted.rows, case.output[f"{grid}/attn_last_cls_row"], **REGION)
        table = model.vit.embeddings.interpolate_pos_encoding(features, *features.shape[2:])
        assert_close(table, case.output[f"{grid}/pos_embed_used"], **REGION)


@pytest.mark.parametrize("case", cases("07_hipt_region_512x768", "07_hipt_region_600x800"), indirect=True)
@pytest.mark.parametrize("tile_batch_size", [256, 4])
@torch.no_grad()
def test_a_region_has_the_features_and_attention_of_the_original(case: Case, weights, tile_batch_size):
    model = hipt_model(weights, case.meta["vit256"], case.meta["vit4k"], tile_batch_size=tile_batch_size)
    pixels = (case.input["region_u8_hwc"].permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    output, attention = model(pixels), model.attention(pixels)
    expected = case.output
    assert output.tile_features.shape[2:] == tuple(expected["grid_hw"].tolist())
    assert_close(output.tile_features, expected["feature_grid"], **TILE)
    assert_close(output.tile_features[0].flatten(1).T, expected["features_cls256"], **TILE)
    assert_close(output.tile_mean, expected["features_mean256"], **TILE)
    assert_close(output.pooler_output, expected["features_cls4k"], **REGION)
    assert_close(
        torch.cat([output.tile_mean, output.pooler_output], dim=1), expected["features_mean256_cls4k"], **REGION
    )
    assert_close(output.last_hidden_state, expected["tokens4k"], **REGION)
    assert_close(attention.tiles[0].flatten(0, 1).flatten(2), expected["attn256_last_cls_row"][..., 1:], **TILE)
    assert_close(attention.regions[0].flatten(1), expected["attn4k_last"][0, :, 0, 1:], **REGION)
