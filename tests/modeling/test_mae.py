"""MAE on a tiny model: its loss against a naive loop, how it starts, what it hides, saving, loading, exporting."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    ResNetConfig,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

import hf_pathology  # noqa: F401
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.modeling_mae import MaeForPreTraining, hidden_count, hidden_pixel_loss, standardised
from hf_pathology.training.optimizer import parameter_groups, set_rates


EDGE = 5  # patches along a view
TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8 * EDGE,
    "patch_size": 8,
}
TINY_DECODER = {
    "decoder_hidden_size": 12,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 20,
}
HIDDEN = 19  # of 25 patches: 6 stay, the whole part of a quarter


def tiny_config(**options) -> MaeConfig:
    return MaeConfig(TINY_VIT, **{**TINY_DECODER, **options})


def tiny_model(**options) -> MaeForPreTraining:
    """A model in training mode whose weights are not where they start."""
    torch.manual_seed(0)
    model = MaeForPreTraining(tiny_config(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def views(batch: int = 3, views: int = 1, hidden: int = HIDDEN, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random views of `batch` tiles, of each of which `hidden` patches are hidden."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(views, batch, EDGE * EDGE, generator=generator).argsort(dim=2).argsort(dim=2)
    return {
        "global_views": torch.randn(views, batch, 3, 8 * EDGE, 8 * EDGE, generator=generator),
        "hidden": (ranks < hidden).view(views, batch, EDGE, EDGE),
    }


def part(inputs: dict[str, torch.Tensor], tiles: slice) -> dict[str, torch.Tensor]:
    return {name: value[:, tiles] for name, value in inputs.items()}


def take_step(model: MaeForPreTraining, optimizer: torch.optim.Optimizer, **inputs: torch.Tensor) -> float:
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.after_step(0, 1)
    return float(loss.detach())


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


# How it starts.


@pytest.fixture(scope="module")
def new_model() -> MaeForPreTraining:
    """An untrained model wide enough for its random weights to be judged by their spread."""
    torch.manual_seed(0)
    trunk = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 768}
    return MaeForPreTraining(MaeConfig({**trunk, "image_size": 32, "patch_size": 8}, decoder_num_hidden_layers=2))


def assert_uniform(weight: torch.Tensor, bound: float) -> None:
    """All of `weight` lies within the bound, and its spread is that of a uniform distribution over it."""
    weight = weight.detach()
    assert weight.abs().max() <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert abs(float(weight.mean())) < 4 * bound / (3 * weight.numel()) ** 0.5


def test_linear_layers_start_as_xavier_with_query_key_and_value_as_one_matrix(new_model):
    linears = {name: each for name, each in new_model.named_modules() if isinstance(each, nn.Linear)}
    assert len(linears) == 2 * 6 + 2 * 6 + 2  # two layers of each, the way into the decoder, the way out
    for name, linear in linears.items():
        outputs, inputs = linear.weight.shape
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            outputs *= 3
        assert_uniform(linear.weight, (6 / (inputs + outputs)) ** 0.5)
        assert not linear.bias.any()


def test_the_patch_projection_starts_as_one_linear_layer_of_all_values_of_a_patch(new_model):
    projection = new_model.autoencoder.vit.embeddings.patch_embeddings.projection
    assert_uniform(projection.weight, (6 / (3 * 8 * 8 + 192)) ** 0.5)
    bound = (3 * 8 * 8) ** -0.5
    assert 0.9 * bound < projection.bias.abs().max() <= bound


def test_class_token_and_mask_token_start_small_and_norms_as_the_identity(new_model):
    for token in (new_model.autoencoder.vit.embeddings.cls_token, new_model.autoencoder.decoder.mask_token):
        assert float(token.detach().std()) == pytest.approx(0.02, rel=0.15)
        assert abs(float(token.detach().mean())) < 0.005
    norms = [each for each in new_model.modules() if isinstance(each, nn.LayerNorm)]
    assert len(norms) == 2 * 2 + 2 * 2 + 2
    assert all((norm.weight == 1).all() and not norm.bias.any() and norm.eps == 1e-6 for norm in norms)


def test_the_tables_are_waves_of_the_column_then_of_the_row(new_model):
    for table in (
        new_model.autoencoder.vit.embeddings.position_embeddings,
        new_model.autoencoder.decoder.decoder_pos_embed,
    ):
        width, edge = table.shape[2], 4
        assert not table[0, 0].any()
        for row, column in ((0, 0), (2, 1), (3, 3)):
            wave = []
            for place in (column, row):
                angles = [place / 10000 ** (4 * k / width) for k in range(width // 4)]
                wave += [
                    torch.tensor(angles, dtype=torch.float64).sin(),
                    torch.tensor(angles, dtype=torch.float64).cos(),
                ]
            assert_close(table[0, 1 + edge * row + column], torch.cat(wave).float(), atol=1e-7, rtol=0)


def test_two_seeds_make_two_models_with_the_same_tables():
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(MaeForPreTraining(tiny_config()).state_dict())
    same = {name for name, value in models[0].items() if torch.equal(value, models[1][name])}
    tables = {"autoencoder.vit.embeddings.position_embeddings", "autoencoder.decoder.decoder_pos_embed"}
    constant = {name for name in same if "norm" in name or (name.endswith("bias") and "projection" not in name)}
    assert same - constant == tables


def test_a_new_model_predicts_no_better_than_the_mean_and_no_worse_than_twice_that(new_model):
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(1, 8, 16, generator=generator).argsort(dim=2).argsort(dim=2)
    with torch.no_grad():
        loss = new_model(torch.randn(1, 8, 3, 32, 32, generator=generator), (ranks < 12).view(1, 8, 4, 4)).loss
    assert 1 < float(loss) < 2.5


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (ResNetConfig(), {}, "a resnet cannot, take a vit"),
        ({"image_size": 100}, {}, "image_size is 100: it must be square and a multiple of patch_size, 8"),
        ({"image_size": [40, 80]}, {}, "it must be square"),
        ({"hidden_size": 18}, {}, "hidden_size is 18: it must be a multiple of 4 and of its number of heads, 2"),
        ({}, {"decoder_hidden_size": 16}, "decoder_hidden_size is 16: it must be a multiple of 4 and .* heads, 3"),
        ({}, {"mask_ratio": 0.0}, "mask_ratio is 0.0: of 25 patches it must hide some and leave some"),
        ({}, {"mask_ratio": 0.97}, "mask_ratio is 0.97"),
    ],
)
def test_what_mae_cannot_be_made_of_is_refused(encoder, options, message):
    config = MaeConfig(
        {**TINY_VIT, **encoder} if isinstance(encoder, dict) else encoder, **{**TINY_DECODER, **options}
    )
    with pytest.raises(ValueError, match=message):
        MaeForPreTraining(config)


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


# The encoder.


def test_the_encoder_is_a_plain_vit_that_sees_all_patches():
    model = tiny_model().eval()
    pixels = views()["global_views"][0]
    whole = copy.deepcopy(model.autoencoder.vit)
    whole.config.mask_ratio = 0.0
    order = torch.arange(EDGE * EDGE, dtype=torch.float32).expand(3, -1)
    encoder = model.encoder
    assert type(encoder) is ViTModel and encoder.pooler is None and not encoder.training
    with torch.no_grad():
        assert_close(encoder(pixels).last_hidden_state, whole(pixels, noise=order).last_hidden_state)


def test_the_encoder_shares_its_tensors_and_asks_for_no_gradient():
    model = tiny_model()
    encoder = model.encoder
    names = dict(model.autoencoder.vit.named_parameters())
    for name, parameter in encoder.named_parameters():
        assert parameter.data_ptr() == names[name].data_ptr() and not parameter.requires_grad
    take_step(model, torch.optim.SGD(model.parameters(), lr=1.0), **views())
    assert all(torch.equal(value, names[name]) for name, value in encoder.named_parameters())
    learning = {name for name, parameter in names.items() if parameter.requires_grad}
    assert learning == names.keys() - {"embeddings.position_embeddings"}


def test_the_exported_encoder_is_a_vit_with_the_table_in_its_place(tmp_path):
    torch.manual_seed(0)
    model = MaeForPreTraining(tiny_config())
    export_encoder(model.encoder, tmp_path / "encoder", tile_size=8 * EDGE, mpp=0.5)
    loaded, loading = AutoModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert type(loaded) is ViTModel and loaded.config.model_type == "vit"
    assert not hasattr(loaded.config, "mask_ratio")
    table = model.autoencoder.vit.embeddings.position_embeddings
    assert table[0, 1:].abs().amax(dim=1).min() > 0.5
    assert torch.equal(loaded.embeddings.position_embeddings, table)
    pixels = views()["global_views"][0]
    assert torch.equal(loaded(pixels).last_hidden_state, loaded(pixels).last_hidden_state)  # nothing is drawn
    assert loaded(pixels).last_hidden_state.shape == (3, 1 + EDGE * EDGE, 16)


@pytest.fixture
def released() -> ViTModel:
    torch.manual_seed(7)
    return ViTModel(ViTConfig(**TINY_VIT, layer_norm_eps=1e-6), add_pooling_layer=False)


def test_training_starts_from_a_released_vit_with_its_own_table_and_a_new_decoder(released, tmp_path):
    released.save_pretrained(tmp_path)
    model = MaeForPreTraining.from_encoder(str(tmp_path), MaeConfig(**TINY_DECODER))
    assert_close(dict(model.encoder.state_dict()), dict(released.state_dict()), atol=0, rtol=0)
    assert not model.autoencoder.vit.embeddings.position_embeddings.requires_grad
    assert model.config.encoder_config.hidden_size == model.autoencoder.config.hidden_size == 16
    new = MaeForPreTraining(tiny_config())
    assert torch.equal(model.autoencoder.decoder.decoder_pos_embed, new.autoencoder.decoder.decoder_pos_embed)
    assert torch.isfinite(model(**views()).loss)


def test_training_starts_from_the_release_of_a_run_of_ours(tmp_path):
    model = tiny_model()
    export_encoder(model.encoder, tmp_path / "encoder", tile_size=8 * EDGE, mpp=0.5)
    again = MaeForPreTraining.from_encoder(str(tmp_path / "encoder"), MaeConfig(**TINY_DECODER))
    assert_close(dict(again.encoder.state_dict()), dict(model.encoder.state_dict()), atol=0, rtol=0)


def test_training_starts_from_a_released_vit_mae_and_ends_as_a_vit(tmp_path):
    model = tiny_model()
    model.save_vit_mae(tmp_path)
    again = MaeForPreTraining.from_encoder(str(tmp_path), MaeConfig(**TINY_DECODER))
    assert_close(dict(again.encoder.state_dict()), dict(model.encoder.state_dict()), atol=0, rtol=0)
    assert again.config.encoder_config.model_type == again.encoder.config.model_type == "vit"
    assert again.config.encoder_config.layer_norm_eps == 1e-6
    assert not hasattr(again.encoder.config, "mask_ratio")


def test_a_release_of_another_type_is_refused(tmp_path):
    ResNetConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a resnet cannot, take a vit"):
        MaeForPreTraining.from_encoder(str(tmp_path), tiny_config())


def test_a_release_without_all_its_weights_is_refused(released, tmp_path):
    weights = {name: value for name, value in released.state_dict().items() if "layers.1.mlp" not in name}
    released.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="lacks the weights"):
        MaeForPreTraining.from_encoder(str(tmp_path), tiny_config())


# Saving and loading.


def names_in(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())  # noqa: SIM118


@pytest.mark.parametrize("kind", [MaeForPreTraining, AutoModel])
def test_a_saved_model_loads_whole(tmp_path, kind):
    model = tiny_model(norm_pix_loss=False)
    model.save_pretrained(tmp_path)
    loaded, loading = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    assert isinstance(loaded, MaeForPreTraining)
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.mask_ratio == 0.75 and loaded.config.norm_pix_loss is False
    tables = ("autoencoder.vit.embeddings.position_embeddings", "autoencoder.decoder.decoder_pos_embed")
    parameters = dict(loaded.named_parameters())
    assert all(parameters[name].requires_grad != (name in tables) for name in parameters)
    model.eval(), loaded.eval()
    loaded.suit(torch.device("cpu")), model.suit(torch.device("cpu"))
    assert torch.equal(loaded(**views()).loss, model(**views()).loss)


@pytest.mark.parametrize("saved_before", [False, True])
def test_files_hold_the_names_of_the_published_ones(tmp_path, saved_before):
    model = tiny_model()
    if saved_before:  # what was loaded is written as what was made
        model.save_pretrained(tmp_path / "first")
        model = MaeForPreTraining.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "ours")
    model.save_vit_mae(tmp_path / "theirs")
    names = names_in(tmp_path / "theirs")
    assert names_in(tmp_path / "ours") == [f"autoencoder.{name}" for name in names]
    # As in facebook/vit-mae-base, which transformers 4 wrote and reads.
    layer = [
        f"{part}.{kind}"
        for part in (
            "attention.attention.key",
            "attention.attention.query",
            "attention.attention.value",
            "attention.output.dense",
            "intermediate.dense",
            "layernorm_after",
            "layernorm_before",
            "output.dense",
        )
        for kind in ("bias", "weight")
    ]
    around = [
        "cls_token",
        "patch_embeddings.projection.bias",
        "patch_embeddings.projection.weight",
        "position_embeddings",
    ]
    decoder = [f"{part}.{kind}" for part in ("embed", "norm", "pred") for kind in ("bias", "weight")]
    expected = [f"vit.encoder.layer.{i}.{name}" for i in range(2) for name in layer]
    expected += [f"decoder.decoder_layers.{i}.{name}" for i in range(2) for name in layer]
    expected += [f"vit.embeddings.{name}" for name in around] + ["vit.layernorm.bias", "vit.layernorm.weight"]
    expected += [f"decoder.decoder_{name}" for name in [*decoder, "pos_embed"]] + ["decoder.mask_token"]
    assert sorted(names) == sorted(expected)


def test_a_saved_vit_mae_is_whole_and_draws_the_same(tmp_path):
    model, inputs = tiny_model(norm_pix_loss=False), views()
    model.save_vit_mae(tmp_path)
    loaded, loading = ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    state = model.autoencoder.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.norm_pix_loss is False and loaded.config.mask_ratio == 0.75
    noise = inputs["hidden"][0].flatten(1).float()
    assert_close(loaded(inputs["global_views"][0], noise=noise).loss, model(**inputs).loss)


def test_a_checkpoint_of_accelerate_holds_and_restores_every_weight_and_table(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny_model())
    accelerator.save_state(tmp_path / "checkpoint", safe_serialization=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert load_file(tmp_path / "checkpoint" / "model.safetensors").keys() == state.keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path / "checkpoint")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_layer_norm_has_the_epsilon_of_the_paper_unless_told_otherwise():
    assert MaeForPreTraining(tiny_config()).autoencoder.config.layer_norm_eps == 1e-6
    assert MaeForPreTraining(tiny_config()).autoencoder.decoder.decoder_norm.eps == 1e-6


def test_the_loss_of_hidden_pixels_is_a_mean_over_values_and_patches():
    predicted, targets = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 3.0], [2.0, 0.0], [9.0, 9.0]]])
    assert hidden_pixel_loss(predicted, targets, torch.tensor([[True, True, False]])) == pytest.approx((5 + 2) / 2)


def test_the_defaults_are_the_published_base_model():
    config = MaeConfig()
    encoder = config.encoder_config
    assert (encoder.hidden_size, encoder.num_hidden_layers, encoder.num_attention_heads) == (768, 12, 12)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (512, 8)
    assert (config.mask_ratio, config.norm_pix_loss) == (0.75, True)
    with torch.device("meta"):
        model = MaeForPreTraining(config)
    published = ViTMAEConfig(norm_pix_loss=True, layer_norm_eps=1e-6)
    ours = model.autoencoder.config.to_dict()
    assert {name: ours[name] for name in published.to_dict() if name != "architectures"}.items() >= {
        name: value for name, value in published.to_dict().items() if name in ours and name != "architectures"
    }.items()
    assert sum(parameter.numel() for parameter in model.parameters()) == 111_907_840
