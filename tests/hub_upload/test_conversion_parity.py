"""Converted checkpoints give the numbers of the original codes (see `tests/originals.py`), through the command itself."""

import json
from pathlib import Path

import pytest
import torch
from original_checkpoints import (
    byol_checkpoint,
    dino_checkpoint,
    mae_checkpoint,
    moco_checkpoint,
    saved,
    simclr_checkpoint,
)
from originals import FIXTURES, Case, cases, read_case
from programs import run_command
from torch.testing import assert_close
from torchvision.models import resnet18, resnet50
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel, ViTMAEForPreTraining


OUTPUT = {"atol": 2e-5, "rtol": 1e-5}
REGION = {"atol": 1e-4, "rtol": 0}


def converted(form: str, *files: Path, **options: object) -> PreTrainedModel:
    """The model that the command makes of `files`, loaded as anybody would, whole."""
    out = files[0].parent / "release"
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    finished = run_command("convert", form, *files, "--out", out, *[word for word in words if word is not True])
    assert finished.returncode == 0, finished.stderr
    loader = ViTMAEForPreTraining if form == "mae-full" else AutoModel
    model, loading = loader.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    return model.eval()


def report_of(folder: Path) -> dict:
    return json.loads((folder / "release" / "conversion.json").read_text())


@pytest.mark.parametrize("size", [224, 96])
@torch.no_grad()
def test_a_dino_checkpoint_gives_the_original_tokens_at_its_size_and_at_another(goldens, tmp_path, size):
    weights, case = (read_case(goldens / f"01_dino_vit_{name}.safetensors") for name in ("weights", f"{size}x{size}"))
    file = saved(dino_checkpoint(weights.state), tmp_path / "checkpoint.pth")
    model = converted("dino", file, num_heads=weights.meta["args"]["num_heads"], image_size=size)
    output = model(case.input["x"])
    assert_close(output.last_hidden_state, case.output["tokens"], **OUTPUT)
    assert_close(output.pooler_output, case.output["cls"], **OUTPUT)
    assert model.config.image_size == AutoImageProcessor.from_pretrained(tmp_path / "release").tile_size == size


@pytest.mark.parametrize("size", ["96x96"])
def test_the_table_of_positions_is_baked_by_the_rule_of_dino(tmp_path, size):
    case = read_case(FIXTURES / "01_dino_vit_tables.safetensors")
    small = read_case(FIXTURES / "07_hipt_weights.safetensors").state
    state = {name.removeprefix("vit256."): tensor for name, tensor in small.items() if name.startswith("vit256.")}
    state["pos_embed"] = case.state["pos_embed"].repeat(
        1, 1, 3
    )  # the first 16 channels of the original's, three times
    model = converted("dino", saved(state, tmp_path / "backbone.pth"), num_heads=6, image_size=int(size.split("x")[0]))
    assert_close(model.embeddings.position_embeddings[..., :16], case.output[size], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", cases("05_ibot_vit"), indirect=True)
@torch.no_grad()
def test_an_ibot_checkpoint_gives_the_original_tokens(case, tmp_path):
    state = {name: tensor for name, tensor in case.state.items() if name != "masked_embed"}
    file = saved(dino_checkpoint(state, case.state, loss="ibot_loss"), tmp_path / "ibot_vit_base_pancan.pth")
    model = converted("ibot", file, num_heads=case.meta["args"]["num_heads"])
    nothing_hidden = ~case.input["mask"].flatten(1).any(dim=1)  # images in which no patch was hidden
    tokens = model(case.input["x"]).last_hidden_state
    assert nothing_hidden.any()
    assert_close(tokens[nothing_hidden], case.output["tokens_masked"][nothing_hidden], **OUTPUT)
    report = report_of(tmp_path)["sources"][0]
    assert report["network"] == "teacher" and report["unexpected"] == report["missing"] == []
    assert report["used"] == len(state) and report["left_out"]["student network"] == len(case.state) + 8


@pytest.mark.parametrize("case", cases("06_mae_normpix_true", "06_mae_normpix_false"), indirect=True)
@torch.no_grad()
def test_a_whole_mae_draws_the_original_patches_and_has_the_original_loss(case: Case, tmp_path):
    arguments = case.meta["args"]
    settings = {"mask_ratio": case.meta["mask_ratio"], "norm_pix_loss": arguments["norm_pix_loss"]}
    file = saved(mae_checkpoint(case.state, **settings), tmp_path / "checkpoint-799.pth")
    heads = {"num_heads": arguments["num_heads"], "decoder_heads": arguments["decoder_num_heads"]}
    output = converted("mae-full", file, **heads)(case.input["x"], noise=case.input["noise"])
    assert_close(output.logits, case.output["pred"], **OUTPUT)
    assert_close(output.loss, case.output["loss"], atol=0, rtol=1e-5)
    assert report_of(tmp_path)["sources"][0]["architecture"]["norm_pix_loss_from"] == "the run's settings"


@pytest.mark.parametrize("case", cases("06_mae_normpix_true"), indirect=True)
@torch.no_grad()
def test_the_encoder_of_an_mae_gives_the_original_latents_of_the_patches_it_is_shown(case: Case, tmp_path):
    file = saved({"model": case.state}, tmp_path / "mae_pretrain_vit_base_full.pth")
    model = converted("mae", file, num_heads=case.meta["args"]["num_heads"])
    # The original leaves patches out after adding their positions: here by the model's own parts, in the original's order.
    visible = case.output["latent"].shape[1] - 1
    kept = case.output["ids_restore"].argsort(dim=1)[:, :visible]
    tokens = model.embeddings(case.input["x"])
    patches = tokens[:, 1:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
    tokens = torch.cat([tokens[:, :1], patches], dim=1)
    for layer in model.layers:
        tokens = layer(tokens)
    assert_close(model.layernorm(tokens), case.output["latent"], **OUTPUT)
    assert report_of(tmp_path)["sources"][0]["left_out"]["decoder"] > 20


def levels(tmp_path: Path) -> tuple[Path, Path, dict]:
    """HIPT's two files, and the arguments of their networks."""
    case = read_case(FIXTURES / "07_hipt_weights.safetensors")
    files = []
    for part, name in (("vit256.", "vit256_small_dino.pth"), ("vit4k.", "vit4k_xs_dino.pth")):
        state = {key.removeprefix(part): value for key, value in case.state.items() if key.startswith(part)}
        files.append(saved(dino_checkpoint(state), tmp_path / name))
    return *files, case.meta


@pytest.mark.parametrize("case", cases("07_hipt_region_512x768", "07_hipt_region_600x800"), indirect=True)
@torch.no_grad()
def test_both_levels_of_hipt_give_the_original_features_of_a_region(case: Case, tmp_path):
    tiles, regions, meta = levels(tmp_path)
    heads = {"num_heads": meta["vit256"]["num_heads"], "region_heads": meta["vit4k"]["num_heads"]}
    model = converted("hipt", regions, tiles, **heads)
    pixels = (case.input["region_u8_hwc"].permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    output = model(pixels)
    assert_close(output.tile_features, case.output["feature_grid"], atol=2e-5, rtol=0)
    assert_close(output.pooler_output, case.output["features_cls4k"], **REGION)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "release")
    assert tuple(processor.image_mean) == tuple(processor.image_std) == (0.5, 0.5, 0.5)
    assert (processor.tile_size, processor.region) == (256, 16)


@pytest.mark.parametrize("form", ["hipt", "slpd"])
@pytest.mark.parametrize("case", cases("07_hipt_vit4k_grids"), indirect=True)
@torch.no_grad()
def test_the_second_level_alone_gives_the_original_tokens_of_grids_of_any_shape(case: Case, tmp_path, form):
    _, regions, meta = levels(tmp_path)
    model = converted(form, regions, region_heads=meta["vit4k"]["num_heads"])
    for grid, features in case.input.items():
        output = model(features)
        assert_close(output.last_hidden_state, case.output[f"{grid}/tokens"], **REGION)
        assert_close(output.pooler_output, case.output[f"{grid}/cls"], **REGION)


def resnet_with_statistics(make=resnet50, seed: int = 0) -> torch.nn.Module:
    """A ResNet of torchvision in whose batch norms nothing is where it starts."""
    torch.manual_seed(seed)
    model = make(weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0.0, 0.1)
            module.num_batches_tracked.fill_(7)
    return model.eval()


def trunk_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}


@torch.no_grad()
def features_of(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    model.fc = torch.nn.Identity()
    return model(pixels)


@pytest.mark.parametrize("form", ["simclr", "moco", "byol"])
@torch.no_grad()
def test_the_backbones_of_contrastive_methods_give_torchvisions_features(tmp_path, form):
    model = resnet_with_statistics(resnet50 if form == "simclr" else resnet18, seed=1)
    other = resnet_with_statistics(resnet18, seed=2)
    if form == "simclr":
        content = simclr_checkpoint(trunk_of(model))
    else:
        content = (moco_checkpoint if form == "moco" else byol_checkpoint)(trunk_of(model), trunk_of(other))
    file = saved(content, tmp_path / f"{form}.pth.tar", legacy=form == "moco")
    release = converted(form, file)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = features_of(model, pixels)
    assert_close(release(pixels).pooler_output.flatten(1), expected, atol=1e-5, rtol=1e-5)
    assert AutoImageProcessor.from_pretrained(tmp_path / "release").pooling == "gap"
    report = report_of(tmp_path)["sources"][0]
    assert report["unexpected"] == [] and report["used"] == len(trunk_of(model))
    assert report["network"] == {"simclr": "convnet", "moco": "encoder_q", "byol": "net_online"}[form]
    if form != "simclr":
        release = converted(form, file, student=True)
        assert_close(release(pixels).pooler_output.flatten(1), features_of(other, pixels), atol=1e-5, rtol=1e-5)
        assert report_of(tmp_path)["sources"][0]["network"] == {"moco": "encoder_k", "byol": "net_target"}[form]
