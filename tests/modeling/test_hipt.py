"""HIPT on a tiny model: batches, masks, edges, attention, and its region level as the trunk of DINO."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel

from hf_pathology.modeling.configuration_dino import DinoConfig
from hf_pathology.modeling.configuration_hipt import HiptConfig, HiptRegionConfig
from hf_pathology.modeling.modeling_dino import DinoForPreTraining
from hf_pathology.modeling.modeling_hipt import HiptModel


TILE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
TILE |= {"image_size": 32, "patch_size": 8}
REGION = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "grid_size": 4}


def tiny_hipt(**options) -> HiptModel:
    """A model whose weights are not where they start."""
    torch.manual_seed(0)
    model = HiptModel(HiptConfig(TILE, REGION, tile_size=32, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def regions(batch: int = 2, height: int = 96, width: int = 128) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_batch_gives_what_each_region_gives_however_many_tiles_go_at_once():
    whole, pixels = tiny_hipt()(regions()), regions()
    for number in range(2):
        one = tiny_hipt(tile_batch_size=5)(pixels[number : number + 1])
        for name, value in one.items():
            assert_close(value[0], whole[name][number])
    assert whole.last_hidden_state.shape == (2, 1 + 3 * 4, 12) and whole.tile_features.shape == (2, 24, 3, 4)
    assert_close(whole.tile_mean, whole.tile_features.mean(dim=(2, 3)))
    assert torch.equal(whole.pooler_output, whole.last_hidden_state[:, 0])


@torch.no_grad()
def test_nothing_of_a_masked_tile_reaches_the_region():
    model, pixels = tiny_hipt(), regions()
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.6
    hidden = ~mask.repeat_interleave(32, dim=1).repeat_interleave(32, dim=2)
    before, after = model(pixels, mask), model(pixels.masked_fill(hidden[:, None], 7.0), mask)
    assert torch.equal(before.pooler_output, after.pooler_output) and torch.equal(before.tile_mean, after.tile_mean)
    assert not before.tile_features.permute(0, 2, 3, 1)[~mask].any()
    shown = before.tile_features.permute(0, 2, 3, 1)[0][mask[0]]
    assert_close(before.tile_mean[0], shown.mean(dim=0))
    assert not torch.allclose(before.pooler_output, model(pixels).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_masked_region_is_the_smaller_region_but_for_the_places_of_its_tiles(attention):
    """Positions are the table's own when the grid has its size; so the first level alone can be compared, and is equal."""
    model, pixels = tiny_hipt(), regions(height=128)
    model.set_attn_implementation(attention)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :2, :3] = True
    part, whole = model(pixels[:, :, :64, :96]), model(pixels, mask)
    assert_close(whole.tile_features[:, :, :2, :3], part.tile_features)
    assert_close(whole.tile_mean, part.tile_mean)


@torch.no_grad()
def test_a_region_without_any_tile_has_finite_features():
    output = tiny_hipt()(regions(), torch.zeros(2, 3, 4, dtype=torch.bool))
    assert torch.isfinite(output.last_hidden_state).all() and not output.tile_mean.any()


@torch.no_grad()
def test_padding_keeps_what_cropping_loses():
    pixels = regions(height=40, width=100)
    assert tiny_hipt()(pixels).tile_features.shape[2:] == (1, 3)
    padded = tiny_hipt(fit="pad")
    assert padded(pixels).tile_features.shape[2:] == (2, 4)
    white = torch.ones(2, 3, 64, 128)
    white[:, :, :40, :100] = pixels
    assert torch.equal(padded(pixels).pooler_output, padded(white).pooler_output)
    assert padded(pixels[:, :, :9, :9]).tile_features.shape[2:] == (1, 1)


@torch.no_grad()
def test_autocast_in_bfloat16_is_near_float32():
    model, pixels = tiny_hipt(), regions()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels)
    assert (
        torch.nn.functional.cosine_similarity(output.pooler_output.float(), model(pixels).pooler_output).min() > 0.999
    )


@torch.no_grad()
def test_attention_is_that_of_the_eager_layers():
    model, pixels = tiny_hipt(), regions(height=128)
    mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.6
    model.set_attn_implementation("eager")
    found = model.attention(pixels, mask)
    tiles = model.tiles_of(pixels)[mask]
    weights = model.tile_encoder(tiles, output_attentions=True).attentions[-1][:, :, 0, 1:]
    assert_close(found.tiles[mask].flatten(2), weights)
    assert not found.tiles[~mask].any() and not found.regions.transpose(0, 1)[:, ~mask].any()
    model.set_attn_implementation("sdpa")
    assert_close(model.attention(pixels, mask).regions, found.regions)


@pytest.mark.parametrize(
    ("pixels", "mask", "message"),
    [
        (regions(), torch.ones(2, 4, 3, dtype=torch.bool), r"the mask is torch.bool of \(2, 4, 3\)"),
        (regions(), torch.ones(2, 3, 4), "the mask is torch.float32"),
        (regions(height=31), None, "a region of 128 x 31 px has no whole tile of 32 px"),
    ],
)
def test_what_is_no_region_is_refused(pixels, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_hipt()(pixels, mask)


def test_levels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="takes features of length 20, but those of the tile encoder have 24"):
        HiptModel(HiptConfig(TILE, HiptRegionConfig(**{**REGION, "input_size": 20})))
    with pytest.raises(ValueError, match="a resnet has no class token"):
        HiptModel(HiptConfig(AutoConfig.for_model("resnet"), REGION))
    with pytest.raises(ValueError, match="fit is 'stretch'"):
        HiptConfig(fit="stretch")


def test_the_defaults_are_hipts():
    config = HiptConfig()
    assert config.tile_config.hidden_size == config.region_config.input_size == 384
    with torch.device("meta"):
        model = HiptModel(config)
    # A ViT-S/16 with a table for 256 px, and ViT-4K-XS with one of 14 x 14.
    assert sum(each.numel() for each in model.tile_encoder.parameters()) == 21_665_664 + (256 - 196) * 384
    assert sum(each.numel() for each in model.region_encoder.parameters()) == 2_781_504


@torch.no_grad()
def test_a_saved_model_loads_whole(tmp_path):
    model = tiny_hipt()
    model.save_pretrained(tmp_path)
    loaded, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is HiptModel and not loading["missing_keys"] and not loading["unexpected_keys"]
    assert_close(loaded(regions()).pooler_output, model(regions()).pooler_output, atol=0, rtol=0)


def dino_on_grids() -> DinoForPreTraining:
    torch.manual_seed(0)
    trunk = HiptRegionConfig(input_size=8, **REGION)
    return DinoForPreTraining(DinoConfig(trunk, out_dim=16, head_hidden_dim=20, head_bottleneck_dim=8)).train()


def test_dino_trains_the_region_level_on_crops_of_grids_packed_or_not():
    model = dino_on_grids()
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    draw = torch.Generator().manual_seed(1)
    views = torch.randn(2, 3, 8, 4, 4, generator=draw), torch.randn(4, 3, 8, 2, 2, generator=draw)
    for layer in model.student.layers:
        layer.dropout = torch.nn.Identity()
    gradients = []
    for device in ("cpu", "cuda"):
        model.suit(torch.device(device))
        model.teacher.set_attn_implementation("eager")
        loss = model(*views).loss
        names = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        gradients.append((loss, *torch.autograd.grad(loss, names.values())))
    assert model.packs
    assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
