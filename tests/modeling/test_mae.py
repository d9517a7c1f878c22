"""MAE on a tiny model: its loss against a naive loop, what it hides, its step."""

import copy

import pytest
import torch
from tiny_mae import EDGE, HIDDEN, TINY_DECODER, TINY_VIT, part, take_step, tiny_config, tiny_model, views
from torch.testing import assert_close

from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.modeling_mae import MaeForPreTraining, hidden_count, hidden_pixel_loss, standardised
from hf_pathology.training.optimizer import parameter_groups, set_rates


def naive_loss(model: MaeForPreTraining, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss by one view and one patch at a time; the encoder is given the visible patches and nothing else."""
    encoder, decoder = model.autoencoder.vit, model.autoencoder.decoder
    errors = []
    for pixels, hidden in zip(inputs["global_views"].flatten(0, 1), inputs["hidden"].flatten(0, 1)):
        visible, places = [], []
        for row in range(EDGE):
            for column in range(EDGE):
                if not hidden[row, column]:
                    patch = pixels[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                    projection = encoder.embeddings.patch_embeddings.projection
                    token = (projection.weight * patch).sum(dim=(1, 2, 3)) + projection.bias
                    place = 1 + EDGE * row + column
                    visible.append(token + encoder.embeddings.position_embeddings[0, place])
                    places.append(place)
        tokens = torch.stack(
            [encoder.embeddings.cls_token[0, 0] + encoder.embeddings.position_embeddings[0, 0], *visible]
        )
        tokens = tokens[None]
        for layer in encoder.layers:
            tokens = layer(tokens)
        latent = decoder.decoder_embed(encoder.layernorm(tokens))[0]
        canvas = [decoder.mask_token[0, 0]] * (1 + EDGE * EDGE)
        for place, token in zip([0, *places], latent):
            canvas[place] = token
        tokens = torch.stack(canvas)[None] + decoder.decoder_pos_embed
        for layer in decoder.decoder_layers:
            tokens = layer(tokens)
        drawn = decoder.decoder_pred(decoder.decoder_norm(tokens))[0]
        for row in range(EDGE):
            for column in range(EDGE):
                if hidden[row, column]:
                    patch = pixels[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                    target = torch.stack([patch[:, y, x] for y in range(8) for x in range(8)]).flatten()
                    if model.config.norm_pix_loss:
                        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                    errors.append(((drawn[1 + EDGE * row + column] - target) ** 2).mean())
    return sum(errors) / len(errors)


# The loss.


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forward_equals_a_naive_loop_over_views_and_patches(norm_pix_loss, attention):
    model = tiny_model(norm_pix_loss=norm_pix_loss)
    model.suit(torch.device({"eager": "cpu", "sdpa": "cuda"}[attention]))
    inputs = views(views=2)
    loss, naive = model(**inputs).loss, naive_loss(model, inputs)
    assert_close(loss, naive)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, expected = (torch.autograd.grad(value, learning) for value in (loss, naive))
    assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_the_loss_is_that_of_transformers_whose_random_order_of_patches_makes_no_difference():
    model, inputs = tiny_model(), views()
    hidden = inputs["hidden"][0].flatten(1)
    noise = hidden + torch.rand(hidden.shape, generator=torch.Generator().manual_seed(3))
    theirs = model.autoencoder(inputs["global_views"][0], noise=noise)
    assert torch.equal(theirs.mask.bool(), hidden)
    assert_close(model(**inputs).loss, theirs.loss)


def test_nothing_of_a_hidden_patch_reaches_the_encoder_or_the_drawing():
    model, inputs = tiny_model(), views()
    pixels = inputs["global_views"].clone()
    where = inputs["hidden"].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)  # (1, B, H, W)
    pixels.transpose(2, 4)[where.transpose(2, 3)] = 7.0
    seen = []
    model.autoencoder.decoder.register_forward_hook(
        lambda module, given, result: seen.append((given[0], result.logits))
    )
    model(**inputs), model(**{**inputs, "global_views": pixels})
    assert all(torch.equal(before, after) for before, after in zip(*seen))


def test_standardised_patches_have_mean_zero_and_variance_one():
    patches = 3 + 5 * torch.randn(2, 4, 192, generator=torch.Generator().manual_seed(0))
    patches[0, 0] = 2.0  # of one colour: zeros, not infinities
    result = standardised(patches)
    assert_close(result.mean(dim=-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    assert not result[0, 0].any()
    assert_close(result.var(dim=-1).flatten()[1:], torch.ones(7), atol=1e-5, rtol=0)


def test_micro_batches_add_up_to_the_gradient_of_one_large_batch():
    model, inputs = tiny_model(), views(batch=4)
    other = copy.deepcopy(model)
    whole = model(**inputs).loss
    whole.backward()
    losses = [other(**part(inputs, tiles)).loss / 2 for tiles in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4))]
    (sum(losses) / 2).backward()
    assert_close(sum(losses) / 2, whole)
    for parameter, expected in zip(other.parameters(), model.parameters()):
        assert_close(parameter.grad, expected.grad)


def test_under_bfloat16_autocast_the_loss_is_near_that_of_float32():
    model, inputs = tiny_model(), views()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    assert output.loss.dtype == torch.float32
    assert_close(output.loss, model(**inputs).loss, atol=0, rtol=1e-2)


def test_checkpointing_activations_in_encoder_and_decoder_changes_no_gradient():
    model, inputs = tiny_model(), views()
    other = copy.deepcopy(model)
    for trunk in other.trunks:
        trunk.activation_checkpointing_enable()
    assert [layer.gradient_checkpointing for layer in other.layers] == [True] * 4
    for each in (model, other):
        each(**inputs).loss.backward()
    for parameter, expected in zip(other.parameters(), model.parameters()):
        assert parameter.grad is None if expected.grad is None else torch.equal(parameter.grad, expected.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look
def test_compiled_layers_compute_what_eager_ones_do():
    model, inputs = tiny_model(), views()
    other = copy.deepcopy(model)
    for layer in other.layers:
        layer.compile(dynamic=False)
    losses = [each(**inputs).loss for each in (model, other)]
    for loss in losses:
        loss.backward()
    assert_close(losses[1], losses[0])
    for parameter, expected in zip(other.parameters(), model.parameters()):
        assert_close(parameter.grad, expected.grad, atol=1e-5, rtol=1e-4)


# What is hidden.


@pytest.mark.parametrize("patches", [4, 25, 36, 49, 196, 256, 576])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.6, 0.75, 0.9])
def test_transformers_keeps_as_many_patches_as_we_do_not_hide(patches, mask_ratio):
    if patches == hidden_count(patches, mask_ratio):
        pytest.skip("none stays")
    edge = round(patches**0.5)
    config = MaeConfig({**TINY_VIT, "image_size": 8 * edge}, **TINY_DECODER, mask_ratio=mask_ratio)
    with torch.no_grad():
        output = MaeForPreTraining(config).autoencoder.vit(torch.zeros(1, 3, 8 * edge, 8 * edge))
    assert int(output.mask.sum()) == hidden_count(patches, mask_ratio)
    assert output.last_hidden_state.shape[1] == 1 + patches - hidden_count(patches, mask_ratio)


def test_three_quarters_are_hidden_as_published():
    assert [hidden_count(patches, 0.75) for patches in (196, 256, 25)] == [147, 192, HIDDEN]


@pytest.mark.parametrize("hidden", [HIDDEN - 1, HIDDEN + 1, 0, EDGE * EDGE])
def test_another_number_of_hidden_patches_is_refused(hidden):
    message = f"a view has {hidden} hidden patches, but a mask_ratio of 0.75 hides {HIDDEN} of 25"
    with pytest.raises(ValueError, match=message):
        tiny_model()(**views(hidden=hidden))


def test_one_view_with_another_number_of_hidden_patches_is_refused():
    inputs = views()
    inputs["hidden"][0, 2] = ~inputs["hidden"][0, 2]
    with pytest.raises(ValueError, match="a view has 6 hidden patches"):
        tiny_model()(**inputs)


def test_hidden_patches_of_another_grid_are_refused():
    inputs = views()
    with pytest.raises(ValueError, match="hidden speaks of 16 patches, but a view has 25"):
        tiny_model()(inputs["global_views"], inputs["hidden"][..., :4, :4])


def test_views_of_another_size_are_refused():
    inputs = views()
    with pytest.raises(ValueError, match="doesn't match model"):
        tiny_model()(inputs["global_views"][..., :32], inputs["hidden"])


def test_the_loss_of_hidden_pixels_is_a_mean_over_values_and_patches():
    predicted, targets = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 3.0], [2.0, 0.0], [9.0, 9.0]]])
    assert hidden_pixel_loss(predicted, targets, torch.tensor([[True, True, False]])) == pytest.approx((5 + 2) / 2)


# The step.


def test_the_tables_neither_move_nor_decay_and_everything_else_learns():
    model = tiny_model()
    optimizer = torch.optim.AdamW(parameter_groups(model))
    set_rates(optimizer, 1e-2, 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take_step(model, optimizer, **views())
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert still == {"autoencoder.vit.embeddings.position_embeddings", "autoencoder.decoder.decoder_pos_embed"}
    assert model.frozen_parameters(0) == [] and model.schedule_values(0, 1) == {}


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model, inputs = MaeForPreTraining(tiny_config(decoder_hidden_size=48)).train(), views()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [take_step(model, optimizer, **inputs) for _ in range(150)]
    assert losses[-1] < 0.35 * losses[0]
    assert model.collapse_panel()["unexplained"] < 0.4


def test_depths_rise_from_the_embeddings_to_the_decoder_for_every_trained_parameter():
    model = tiny_model()
    depths = model.depths()
    assert depths.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert depths["autoencoder.vit.embeddings.cls_token"] == 0
    assert depths["autoencoder.vit.layers.1.mlp.fc1.weight"] == 2
    assert {depths[name] for name in depths if ".decoder." in name} == {3}
    assert depths["autoencoder.vit.layernorm.weight"] == 3


def test_the_panel_says_how_much_of_the_pixels_is_unexplained():
    model, inputs = tiny_model(norm_pix_loss=False), views(batch=5)
    with torch.no_grad():
        model.autoencoder.decoder.decoder_pred.weight.zero_()
        patches, hidden = model.autoencoder.patchify(inputs["global_views"][0]), inputs["hidden"][0].flatten(1)
        model.autoencoder.decoder.decoder_pred.bias.copy_(patches[hidden].mean(dim=0))
    model(**inputs)
    panel = model.collapse_panel()
    assert panel["unexplained"] == pytest.approx(1.0, rel=1e-5)
    assert 1 < panel["effective_rank"] < 5 and 1 < panel["patch_effective_rank"] < 5
    assert panel["feature_std"] > 0 and panel["patch_feature_std"] > 0


def test_the_panel_sees_that_all_tiles_look_the_same_to_the_encoder():
    model, inputs = tiny_model(), views(batch=5)
    model(inputs["global_views"][:, :1].expand(-1, 5, -1, -1, -1), inputs["hidden"][:, :1].expand(-1, 5, -1, -1))
    panel = model.collapse_panel()
    assert panel["feature_std"] < 1e-5 and panel["patch_feature_std"] < 1e-5


def test_attention_is_chosen_for_the_encoder_and_for_the_decoder():
    model = tiny_model()
    for device, attention in (("cpu", "eager"), ("cuda", "sdpa")):
        model.suit(torch.device(device))
        assert {layer.attention.config._attn_implementation for layer in model.layers} == {attention}
