from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hf_pathology.errors import UserError
from hf_pathology.report.attention import attention_maps, draw_attention, patch_features, patch_lattice


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3)).astype(np.uint8)


def test_attention_is_the_last_layers_class_token_row_over_the_patches(encoder, tiles):
    maps = attention_maps(encoder, tiles)
    assert maps.shape == (3, 2, 4, 4) and maps.dtype == np.float32
    with torch.inference_mode():
        states = encoder.model(encoder.pixels(torch.from_numpy(tiles)), output_hidden_states=True).hidden_states
        layer = encoder.model.layers[-1]
        hidden = layer.layernorm_before(states[-2] if len(states) == 3 else states[1])  # (3, 17, 16)
        query, key = layer.attention.q_proj(hidden), layer.attention.k_proj(hidden)
        query, key = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (query, key))  # (3, 2, 17, 8)
        rows = (query[:, :, :1] @ key.transpose(-1, -2) / 8**0.5).softmax(dim=-1)[:, :, 0, 1:]
    np.testing.assert_allclose(maps, rows.unflatten(-1, (4, 4)).numpy(), atol=1e-6)
    assert (maps.sum(axis=(2, 3)) < 1).all()


def test_patches_keep_their_places(encoder, tiles):
    features = patch_features(encoder, tiles)
    with torch.inference_mode():
        tokens = encoder.model(encoder.pixels(torch.from_numpy(tiles))).last_hidden_state
    assert features.shape == (3, 4, 4, 16)
    np.testing.assert_array_equal(features[1, 2, 3], tokens[1, 1 + 2 * 4 + 3].numpy())


def test_a_convolutional_network_has_patch_features_but_no_attention(encoder, tiles):
    network = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])).eval()
    convolutional = replace(encoder, model=network, pooling="gap")
    assert patch_features(convolutional, tiles).shape == (3, 4, 4, 12)
    with pytest.raises(UserError, match="returns no attention"):
        attention_maps(convolutional, tiles)


def test_an_encoder_with_fast_attention_says_how_to_load_it(encoder, tiles):
    fast = ViTModel(ViTConfig(**encoder.model.config.to_diff_dict() | {"attn_implementation": "sdpa"}))
    with pytest.raises(UserError, match='attention="eager"'):
        attention_maps(replace(encoder, model=fast.eval()), tiles)


def test_tokens_that_form_no_square_are_refused():
    assert patch_lattice(256) == (16, 16)
    with pytest.raises(UserError, match="260 patches are no square"):
        patch_lattice(260)


def test_a_tile_glows_where_attention_is_high():
    tile = np.full((64, 64, 3), 100, np.uint8)
    attention = np.zeros((4, 4))
    attention[0, 0] = 0.3
    picture = draw_attention(tile, attention)
    assert picture.shape == tile.shape and picture[2, 2].max() > 180
    assert np.abs(picture[40:, 40:].astype(int) - 100).max() < 15
    draw_attention(tile, np.full((4, 4), 0.1))  # even attention is no division by zero
