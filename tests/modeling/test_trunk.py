"""Any vision model of transformers as a trunk: what it gives, how deep its weights lie, and views packed into one pass."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

from hf_pathology.modeling.drop_path import DropPath, trunk_layers
from hf_pathology.modeling.packing import PACKED, can_pack, packed_tokens
from hf_pathology.modeling.trunk import (
    has_class_token,
    make_trunk,
    start_trunk,
    trunk_config,
    trunk_depths,
    trunk_tokens,
    trunk_weights,
    trunk_width,
)


PLAIN = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TRANSFORMERS = {
    "vit": ViTConfig(**PLAIN, intermediate_size=32),
    "dinov2": Dinov2Config(**PLAIN),
    "registers": Dinov2WithRegistersConfig(**PLAIN, num_register_tokens=3, use_swiglu_ffn=True),
}
MAPS = {
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2]),
    "convnext": ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2),
    "swin": SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2),
}


def trunk_of(config, **options) -> nn.Module:
    """A trunk whose weights are not where they start, so that every one of them matters."""
    torch.manual_seed(0)
    trunk = make_trunk(config, **options)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return trunk


def pixels(views: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(views, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=TRANSFORMERS)
@pytest.mark.parametrize("size", [32, 16])
def test_a_transformer_gives_its_class_token_and_one_token_for_each_patch(config, size):
    trunk = trunk_of(config).eval()
    image, patches = trunk_tokens(trunk, pixels(size=size))
    assert image.shape == (2, trunk_width(config)) and patches.shape == (2, (size // 8) ** 2, 16)
    options = {"interpolate_pos_encoding": True} if config.model_type == "vit" else {}
    states = trunk(pixels(size=size), **options).last_hidden_state
    assert torch.equal(image, states[:, 0])
    assert torch.equal(patches, states[:, -((size // 8) ** 2) :])


@pytest.mark.parametrize("config", MAPS.values(), ids=MAPS)
def test_a_trunk_without_a_class_token_gives_its_pooled_map(config):
    trunk = trunk_of(config).eval()
    assert not has_class_token(trunk)
    image, patches = trunk_tokens(trunk, pixels())
    assert image.shape == (2, trunk_width(config)) and patches is None
    output = trunk(pixels())
    if config.model_type == "resnet":
        assert_close(image, output.last_hidden_state.mean(dim=(2, 3)))
    assert torch.equal(image, output.pooler_output.flatten(1))


@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_what_a_hidden_patch_shows_changes_nothing(config):
    trunk = trunk_of(config, hides_patches=True).eval()
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, 5] = True
    other = pixels()
    other[:, :, 8:16, 8:16] = 0.0  # patch 5 of 4 x 4
    assert not torch.allclose(trunk_tokens(trunk, pixels())[0], trunk_tokens(trunk, other)[0])
    assert_close(trunk_tokens(trunk, pixels(), hidden), trunk_tokens(trunk, other, hidden))


@pytest.mark.parametrize("config", [*MAPS.values(), ViTMAEConfig()], ids=[*MAPS, "vit_mae"])
def test_a_trunk_that_cannot_hide_patches_is_refused_where_they_are_to_be_hidden(config):
    with pytest.raises(ValueError, match=config.model_type):
        make_trunk(config, hides_patches=True)


@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_every_weight_of_a_trunk_that_hides_no_patches_gets_a_gradient(config):
    trunk = trunk_of(config)
    image, patches = trunk_tokens(trunk, pixels())
    (image.sum() + patches.square().sum()).backward()
    assert not [name for name, parameter in trunk.named_parameters() if parameter.grad is None]


def test_stochastic_depth_rises_along_a_vit_and_is_the_same_all_along_a_dinov2():
    def rates(kind):
        places = [
            layer.dropout if kind == "vit" else layer.drop_path
            for layer in trunk_layers(trunk_of(TRANSFORMERS[kind], drop_path_rate=0.4))
        ]
        return [getattr(place, "rate", 0.0) for place in places]

    assert rates("vit") == pytest.approx([0.0, 0.2, 0.4])
    assert rates("dinov2") == pytest.approx([0.4] * 3)


def test_a_resnet_has_no_stochastic_depth():
    with pytest.raises(ValueError, match="a resnet has no stochastic depth"):
        make_trunk(MAPS["resnet"], drop_path_rate=0.1)


def test_depths_count_from_the_embeddings_to_what_lies_above_the_layers():
    for config in (*TRANSFORMERS.values(), MAPS["resnet"]):
        trunk = make_trunk(config)
        depths = trunk_depths(trunk)
        assert set(depths) == {name for name, _ in trunk.named_parameters()}
        by_depth = {depth: {name for name in depths if depths[name] == depth} for depth in set(depths.values())}
        layers = config.num_hidden_layers if config.model_type != "resnet" else len(config.depths)
        above = {layers + 1} if config.model_type != "resnet" else set()  # a resnet has nothing above its stages
        assert set(by_depth) == set(range(layers + 1)) | above
        assert all(name.startswith("embed") for name in by_depth[0])
        assert all(".0." in name for name in by_depth[1])
        if above:
            assert by_depth[layers + 1] == {"layernorm.weight", "layernorm.bias"}


def test_a_trunk_starts_from_a_release_whole_but_for_the_mask_token(tmp_path):
    release = trunk_of(TRANSFORMERS["vit"], hides_patches=True)
    release.embeddings.mask_token = None
    release.save_pretrained(tmp_path)
    trunk = make_trunk(TRANSFORMERS["vit"], hides_patches=True)
    token = trunk.embeddings.mask_token.clone()
    start_trunk(trunk, trunk_weights(str(tmp_path)))
    assert torch.equal(trunk.embeddings.mask_token, token)
    assert all(torch.equal(trunk.state_dict()[name], weight) for name, weight in release.state_dict().items())


def test_a_configuration_is_made_of_its_dict_and_again():
    for config in (*TRANSFORMERS.values(), *MAPS.values()):
        assert trunk_config(config.to_dict()).to_dict() == config.to_dict()
    assert trunk_config(None).model_type == "vit" and trunk_config({}).layer_norm_eps == 1e-6


# Packing.


def groups(hides: bool) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    hidden = torch.rand(4, 16, generator=torch.Generator().manual_seed(3)) < 0.4
    return [(pixels(4), hidden if hides else None), (pixels(6, size=16), None)]


@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=TRANSFORMERS)
@pytest.mark.parametrize("hides", [False, True], ids=["whole", "hidden"])
def test_packed_views_give_the_tokens_and_gradients_of_separate_ones(config, hides):
    trunk = trunk_of(config, hides_patches=hides)
    assert can_pack(trunk)
    separate = [trunk_tokens(trunk, *group) for group in groups(hides)]
    sum((image.square().sum() + patches.square().sum()) for image, patches in separate).backward()
    gradients = [parameter.grad.clone() for parameter in trunk.parameters()]
    trunk.zero_grad()
    trunk.set_attn_implementation(PACKED)
    packed = packed_tokens(trunk, groups(hides))
    sum((image.square().sum() + patches.square().sum()) for image, patches in packed).backward()
    assert_close(packed, separate, atol=1e-5, rtol=1e-5)
    for (name, parameter), expected in zip(trunk.named_parameters(), gradients):
        assert_close(parameter.grad, expected, atol=1e-4, rtol=1e-4, msg=name)
    assert_close(trunk_tokens(trunk, pixels(4)), trunk_tokens(trunk_of(config, hides_patches=hides), pixels(4)))


def test_a_convolutional_trunk_cannot_be_packed():
    assert not can_pack(make_trunk(MAPS["resnet"]))


def test_in_a_packed_batch_whole_views_are_dropped_at_the_rate():
    drop = DropPath(0.25)
    drop.segments = ((3000, 2), (1000, 5))
    torch.manual_seed(0)
    dropped = drop(torch.ones(1, 3000 * 2 + 1000 * 5, 4))
    first, second = dropped[0, :6000].view(3000, 2, 4), dropped[0, 6000:].view(1000, 5, 4)
    for views in (first, second):
        kept = views[:, 0, 0] > 0
        assert torch.equal(views, (kept / 0.75).view(-1, 1, 1).expand_as(views))
        assert abs(kept.float().mean() - 0.75) < 4 * (0.25 * 0.75 / len(kept)) ** 0.5
    assert drop.eval()(torch.ones(1, 11000, 4)).eq(1).all()


# Stochastic depth over a part of the batch.


@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_a_branch_over_a_part_of_the_batch_is_the_branch_times_a_factor_or_nothing(config):
    plain = trunk_of(config).train()
    subset = trunk_of(config, drop_path_rate=0.5, drop_subset=True).train()
    assert list(subset.state_dict()) == list(plain.state_dict())
    layer, other = trunk_layers(subset)[-1], trunk_layers(plain)[-1]
    states = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(1)
    found, expected = layer.mlp(states), other.mlp(states)
    kept = found.flatten(1).any(dim=1)
    assert kept.sum() == 3
    assert_close(found[kept], 2 * expected[kept])
    attended = layer.attention(states)[0]
    assert attended.flatten(1).any(dim=1).sum() == 3
    assert_close(trunk_tokens(subset.eval(), pixels()), trunk_tokens(plain.eval(), pixels()))


def test_over_many_draws_each_view_of_a_packed_batch_keeps_its_branch_on_average():
    trunk = trunk_of(TRANSFORMERS["dinov2"], drop_path_rate=0.4, drop_subset=True).train()
    layer = trunk_layers(trunk)[1]
    layer.drop_path.segments = ((4, 3), (5, 2))
    torch.manual_seed(0)
    states = torch.randn(1, 22, 16)
    with torch.no_grad():
        draws = torch.stack([layer.mlp(states)[0] for _ in range(3000)])  # (draws, tokens, D)
        layer.drop_path.segments = ()
        expected = layer.eval().mlp(states)[0]
    assert_close(draws.mean(dim=0), expected, atol=0.06 * float(expected.abs().max()), rtol=0)
    kept = draws.abs().sum(dim=2) > 0  # (draws, tokens)
    assert (kept[:, :12].view(-1, 4, 3).any(2).sum(1) == 2).all() and (
        kept[:, 12:].view(-1, 5, 2).any(2).sum(1) == 3
    ).all()
    assert torch.equal(kept[:, :12].view(-1, 4, 3).any(2), kept[:, :12].view(-1, 4, 3).all(2))


@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_packed_views_over_a_part_of_the_batch_stay_among_themselves(config):
    trunk = trunk_of(config, drop_path_rate=0.5, drop_subset=True, hides_patches=True).train()
    trunk.set_attn_implementation(PACKED)
    (first, _), second = groups(True), (pixels(6, size=16) * 3.0, None)
    torch.manual_seed(4)
    one = packed_tokens(trunk, groups(True))
    torch.manual_seed(4)
    other = packed_tokens(trunk, [first, second])
    assert_close(one[0], other[0])
    assert not torch.allclose(one[1][0], other[1][0])
    sum(image.sum() for image, _ in one).backward()
    assert all(parameter.grad.isfinite().all() for parameter in trunk.parameters() if parameter.grad is not None)
