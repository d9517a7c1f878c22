"""What becomes of an MAE: its encoder as a plain ViT, training from a release, its files."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_mae import EDGE, TINY_DECODER, TINY_VIT, take_step, tiny_config, tiny_model, views
from torch.testing import assert_close
from transformers import (
    AutoModel,
    ResNetConfig,
    ViTConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.modeling_mae import MaeForPreTraining


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
