"""HIPT's slide classifiers: parity with the published heads, padding, missing tiles, frozen regions, life without our package."""

from pathlib import Path

import pytest
import torch
from hipt_originals import region_config, slide_weights
from originals import Case, cases
from torch.testing import assert_close
from transformers import AutoModel

from hf_pathology.modeling.configuration_hipt_slide import HiptSlideConfig
from hf_pathology.modeling.modeling_hipt_slide import HiptForSlideClassification


CLOSE = {"atol": 1e-5, "rtol": 0}
TILES, WIDTH = 9, 8  # in a region; of a feature vector
SMALL = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "grid_size": 3}


def original_head(case: Case, **options) -> HiptForSlideClassification:
    head = HiptForSlideClassification(HiptSlideConfig(num_labels=case.meta["n_classes"], **options))
    missing, unexpected = head.load_state_dict(slide_weights(case.state), strict=False)
    assert set(missing) == {"feature_mean", "feature_std"} and not unexpected
    assert head.num_parameters() == sum(weight.numel() for weight in case.state.values())
    return head.eval()


def local_global(case: Case) -> HiptForSlideClassification:
    width, arguments = case.meta["width_192_replaced_by"], case.meta["vit4k"]
    sizes = {"input_embed_dim": case.meta["input_dim_384_replaced_by"], "output_embed_dim": width, "img_size": [224]}
    return original_head(case, input_dim=sizes["input_embed_dim"], region_config=region_config({**arguments, **sizes}))


@pytest.mark.parametrize("case", cases("11_hipt_lgp_fc"), indirect=True)
@torch.no_grad()
def test_the_local_global_head_gives_the_logits_of_the_original(case):
    head, tiles = local_global(case), case.input["x_256"]
    output = head(tiles.flatten(0, 1)[None])
    assert_close(output.logits, case.output["logits"], **CLOSE)
    assert_close(output.logits.softmax(dim=-1), case.output["Y_prob"], **CLOSE)
    regions, _ = head.regions(tiles, torch.ones(tiles.shape[:2], dtype=torch.bool))
    assert_close(regions, case.output["h_4096"], **CLOSE)


@pytest.mark.parametrize("case", cases("11_hipt_gp_fc"), indirect=True)
@torch.no_grad()
def test_the_global_head_gives_the_logits_of_the_original(case):
    width = case.meta["width_192_replaced_by"]
    head = original_head(case, input_dim=width, region_tiles=1, hidden_size=width)
    output = head(case.input["h_4096"][None])
    assert_close(output.logits, case.output["logits"], **CLOSE)


@pytest.mark.parametrize("case", cases("11_hipt_none_fc"), indirect=True)
@torch.no_grad()
def test_the_head_without_transformers_gives_the_logits_of_the_original(case):
    tiles, meta = case.input["x_256"], case.meta
    sizes = {"input_dim": meta["input_dim_384_replaced_by"], "hidden_size": meta["none_width_256_replaced_by"]}
    head = original_head(case, local="attention", region_tiles=tiles.shape[1], **sizes)
    output = head(tiles.flatten(0, 1)[None])
    assert_close(output.logits, case.output["logits"], **CLOSE)
    assert_close(output.logits.softmax(dim=-1), case.output["Y_prob"], **CLOSE)


def test_the_published_head_has_3376515_parameters():
    head = HiptForSlideClassification(HiptSlideConfig(num_labels=2))
    assert head.num_parameters() == 3_376_515


@pytest.fixture(params=["transformer", "attention", "regions"])
def head(request) -> HiptForSlideClassification:
    torch.manual_seed(0)
    options = {"region_tiles": 1} if request.param == "regions" else {"region_tiles": TILES, "local": request.param}
    region = SMALL if request.param == "transformer" else None
    config = HiptSlideConfig(input_dim=WIDTH, region_config=region, hidden_size=12, num_labels=3, **options)
    return HiptForSlideClassification(config).eval()


def bag(head: HiptForSlideClassification, regions: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, regions * head.config.region_tiles, WIDTH, generator=generator)


@torch.no_grad()
def test_slides_in_a_batch_are_what_they_are_alone(head):
    tiles = head.config.region_tiles
    alone = [bag(head, regions, seed) for seed, regions in enumerate((4, 2, 1))]
    batch = torch.full((3, 4 * tiles, WIDTH), float("nan"))
    mask = torch.zeros(3, 4 * tiles, dtype=torch.bool)
    for row, one in enumerate(alone):
        batch[row, : one.shape[1]], mask[row, : one.shape[1]] = one[0], True
    output = head(batch, mask)
    for row, one in enumerate(alone):
        single = head(one)
        assert_close(output.logits[row], single.logits[0], **CLOSE)
        assert_close(output.tile_scores[row, : one.shape[1]], single.tile_scores[0], **CLOSE)
    assert (output.tile_scores[~mask] == 0).all()
    assert_close(output.tile_scores.sum(dim=1), torch.ones(3), **CLOSE)


@torch.no_grad()
def test_a_tile_that_could_not_be_read_has_no_part_in_its_region(head):
    features = bag(head, 3, 0)
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    mask[0, 0] = False
    with_nan = features.masked_fill(~mask.unsqueeze(-1), float("nan"))
    first, other = head(with_nan, mask), head(features, mask)
    assert_close(first.logits, other.logits, **CLOSE)
    assert first.tile_scores[0, 0] == 0
    assert not torch.allclose(first.logits, head(features).logits)


@torch.no_grad()
def test_regions_have_no_order_and_those_without_tiles_do_not_count(head):
    tiles = head.config.region_tiles
    features = bag(head, 3, 0)
    turned = features.unflatten(1, (3, tiles)).flip(1).flatten(1, 2)
    assert_close(head(turned).logits, head(features).logits, **CLOSE)
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    mask[0, :tiles] = False
    assert_close(head(features, mask).logits, head(features[:, tiles:]).logits, **CLOSE)


def test_a_loss_reaches_every_weight_in_use(head):
    features, labels = torch.cat([bag(head, 2, seed) for seed in (0, 1)]), torch.tensor([0, 2])
    head.train()(features, labels=labels).loss.backward()
    without = [name for name, weight in head.named_parameters() if weight.grad is None]
    assert not without


def test_frozen_regions_stay_as_they_are_while_the_rest_is_trained():
    config = HiptSlideConfig(
        input_dim=WIDTH,
        region_tiles=TILES,
        region_config={**SMALL, "hidden_dropout_prob": 0.5},
        freeze_regions=True,
        num_labels=2,
    )
    head = HiptForSlideClassification(config).train()
    assert not head.regions.training and head.embed.training
    assert not any(weight.requires_grad for weight in head.regions.parameters())
    head(bag(head, 2, 0), labels=torch.tensor([1])).loss.backward()
    assert head.classifier.weight.grad is not None


def test_features_are_standardised_by_the_buffers(head):
    features = bag(head, 2, 0)
    plain = head(features).logits
    head.feature_mean.fill_(3.0)
    head.feature_std.fill_(2.0)
    assert_close(head(2 * features + 3).logits, plain, **CLOSE)


def test_mistakes_are_told(head):
    if head.config.region_tiles > 1:
        with pytest.raises(ValueError, match="a bag of 10 tiles is no number of whole regions of 9"):
            head(torch.zeros(1, 10, WIDTH))
    with pytest.raises(ValueError, match="bag 0 of this batch has no real tile"):
        head(bag(head, 1, 0), torch.zeros(1, head.config.region_tiles, dtype=torch.bool))
    with pytest.raises(ValueError, match="'mean'"):
        HiptSlideConfig(local="mean")
    with pytest.raises(ValueError, match="hidden_size is 64: 3 heads cannot share it"):
        HiptSlideConfig(hidden_size=64)
    with pytest.raises(ValueError, match="8 tiles form no square region"):
        HiptForSlideClassification(HiptSlideConfig(input_dim=WIDTH, region_tiles=8, region_config=SMALL))


@torch.no_grad()
def test_saved_it_loads_by_auto_model(head, tmp_path: Path):
    head.feature_mean.fill_(0.5)
    head.save_pretrained(tmp_path)
    loaded, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is HiptForSlideClassification
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    features = bag(head, 2, 0)
    assert all(torch.equal(weight, head.state_dict()[name]) for name, weight in loaded.state_dict().items())
    assert_close(loaded(features).logits, head(features).logits, atol=1e-6, rtol=0)
