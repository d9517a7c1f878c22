"""Our MAE against numbers that the original code computed (see `tests/originals.py`); `pytest -rP` shows how near they are."""

import pytest
import torch
from originals import Case, cases, read_case, vit_config
from torch.testing import assert_close

from hf_pathology.hub_upload.conversion.original_mae import mae_names, mae_weights
from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.mae_start import sincos_table
from hf_pathology.modeling.modeling_mae import MaeForPreTraining, hidden_count


OUTPUT = {"atol": 2e-5, "rtol": 1e-5}
GRADIENT = {"atol": 1e-6, "rtol": 1e-4}
LOSS = {"atol": 0, "rtol": 1e-6}
BOTH = cases("06_mae_normpix_true", "06_mae_normpix_false")


def assert_near(name: str, ours: torch.Tensor, original: torch.Tensor, **tolerance: float) -> None:
    """Prints the largest deviation, in units of the largest original number too, and asserts that it is within `tolerance`."""
    deviation, largest = float((ours - original).detach().abs().max()), float(original.abs().max())
    print(f"{name}: {deviation:.1e}, of numbers up to {largest:.2g}")
    assert_close(ours, original, **tolerance)


def new_mae(case: Case) -> MaeForPreTraining:
    """Our untrained model of the sizes of an original one."""
    arguments = case.meta["args"]
    config = MaeConfig(
        vit_config({**arguments, "img_size": [arguments["img_size"]]}),
        decoder_hidden_size=arguments["decoder_embed_dim"],
        decoder_num_hidden_layers=arguments["decoder_depth"],
        decoder_num_attention_heads=arguments["decoder_num_heads"],
        decoder_intermediate_size=arguments["mlp_ratio"] * arguments["decoder_embed_dim"],
        mask_ratio=case.meta["mask_ratio"],
        norm_pix_loss=arguments["norm_pix_loss"],
    )
    return MaeForPreTraining(config)


def original_mae(case: Case) -> MaeForPreTraining:
    """Our model with the weights of an original one."""
    model = new_mae(case)
    model.autoencoder.load_state_dict(mae_weights(case.state))
    return model


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    """The views and hidden patches of a case, the latter drawn of its noise as the original draws them."""
    noise = case.input["noise"]
    kept = noise.argsort(dim=1)[:, : noise.shape[1] - hidden_count(noise.shape[1], case.meta["mask_ratio"])]
    hidden = torch.ones_like(noise, dtype=torch.bool).scatter(1, kept, False)
    edge = round(noise.shape[1] ** 0.5)
    return {"global_views": case.input["x"][None], "hidden": hidden.view(1, -1, edge, edge)}


def results_of_forward(model: MaeForPreTraining, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the encoder, the decoder and the loss make of a case in one `forward`."""
    results = []
    modules = (model.autoencoder.vit, model.autoencoder.decoder)
    handles = [module.register_forward_hook(lambda *call: results.append(call[-1])) for module in modules]
    loss = model(**inputs_of(case)).loss
    for handle in handles:
        handle.remove()
    return results[0].last_hidden_state, results[1].logits, loss


@pytest.mark.parametrize("case", BOTH, indirect=True)
def test_as_many_patches_are_hidden_as_in_the_original(case):
    hidden = inputs_of(case)["hidden"][0].flatten(1)
    assert torch.equal(hidden.float(), case.output["mask"])


@pytest.mark.parametrize("case", BOTH, indirect=True)
def test_a_converted_mae_gives_the_original_latents_though_it_keeps_the_patches_in_another_order(case):
    latent, _, _ = results_of_forward(original_mae(case), case)
    visible = latent.shape[1] - 1
    kept = case.output["ids_restore"].argsort(dim=1)[:, :visible]  # numbers of the patches, in the original's order
    assert not torch.equal(kept, kept.sort(dim=1).values)
    rank = kept.argsort(dim=1).argsort(dim=1)  # where each stands among ours, which are sorted
    ours = latent[:, 1:].gather(1, rank[..., None].expand(-1, -1, latent.shape[2]))
    assert_near("latents", torch.cat([latent[:, :1], ours], dim=1), case.output["latent"], **OUTPUT)


@pytest.mark.parametrize("case", BOTH, indirect=True)
def test_a_converted_mae_draws_the_original_patches_and_has_the_original_loss(case):
    _, predicted, loss = results_of_forward(original_mae(case), case)
    assert_near("drawn pixels", predicted, case.output["pred"], **OUTPUT)
    assert_near("loss", loss, case.output["loss"], **LOSS)
    if "loss_f64" in case.output:
        assert_near("loss, from double precision", loss.double(), case.output["loss_f64"], **LOSS)


@pytest.mark.parametrize("case", BOTH, indirect=True)
def test_the_gradients_of_the_loss_are_the_original_ones(case):
    model = original_mae(case)
    model(**inputs_of(case)).loss.backward()
    parameters = dict(model.autoencoder.named_parameters())
    gradients = {key.removeprefix("grad/"): value for key, value in case.output.items() if key.startswith("grad/")}
    assert gradients.keys() == {"cls_token", "mask_token", "decoder_embed.weight", "patch_embed.proj.weight"}
    for key, gradient in gradients.items():
        (name,) = mae_names(key)
        assert_near(f"gradient of {key}", parameters[name].grad, gradient, **GRADIENT)


@pytest.mark.parametrize("name", ["06_mae_normpix_true", "06_mae_normpix_false"])
def test_pixels_become_patches_and_pixels_again_in_the_original_order(goldens, name):
    case = read_case(goldens / f"{name}.safetensors")
    autoencoder = original_mae(case).autoencoder
    assert torch.equal(autoencoder.patchify(case.input["x"]), case.output["patchified"])
    assert torch.equal(autoencoder.unpatchify(case.output["pred"]), case.output["unpatchify_pred"])


@pytest.mark.parametrize("case", BOTH, indirect=True)
def test_a_new_model_has_the_original_tables_in_encoder_and_decoder(case):
    tables = {name: table for name, table in new_mae(case).state_dict().items() if "pos" in name}
    assert len(tables) == 2
    for key in ("pos_embed", "decoder_pos_embed"):
        (name,) = mae_names(key)
        assert torch.equal(tables[f"autoencoder.{name}"], case.state[key])


@pytest.mark.parametrize("case", cases("06_mae_extras"), indirect=True)
def test_the_position_table_is_the_original_one_to_the_last_digits(case):
    table = sincos_table(case.meta["embed_dim"], case.meta["grid"])
    assert_near("sin-cos table", table, case.output["sincos_pos_embed"], atol=1e-15, rtol=0)


@pytest.mark.parametrize("case", cases("06_mae_extras"), indirect=True)
def test_the_exported_encoder_resizes_its_table_as_the_original_does(case):
    width, edge = case.meta["embed_dim"], case.meta["grid"]
    trunk = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": width}
    model = MaeForPreTraining(MaeConfig({**trunk, "image_size": 8 * edge, "patch_size": 8}))
    model.autoencoder.vit.embeddings.position_embeddings.copy_(case.input["pos_embed_src"])
    tokens = torch.zeros(1, 1 + 10 * 10, width)
    with torch.no_grad():
        table = model.encoder.embeddings.interpolate_pos_encoding(tokens, height=80, width=80)
    assert_near("table resized to 10 x 10", table, case.output["pos_embed_interp_to_10x10"], atol=1e-6, rtol=1e-6)
