"""`hf-pathology convert` as a user meets it, and what it leaves behind."""

import json
from pathlib import Path

import pytest
import torch
from hipt_originals import hipt_model
from original_checkpoints import dino_checkpoint, mae_checkpoint, saved
from originals import FIXTURES, read_case
from programs import Finished, run_command
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_pathology.errors import UserError
from hf_pathology.features.encoder import load_encoder
from hf_pathology.features.store import SlideFeatures
from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.modeling_mae import MaeForPreTraining
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.synthetic import draw_slide


def level(part: str) -> dict[str, torch.Tensor]:
    state = read_case(FIXTURES / "07_hipt_weights.safetensors").state
    return {key.removeprefix(part): tensor for key, tensor in state.items() if key.startswith(part)}


def run_convert(form: str, *words: object) -> Finished:
    return run_command("convert", form, *words)


def small_vit(model: type = ViTModel, eps: float = 1e-12, **options: object) -> ViTModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return model(ViTConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=eps), **options).eval()


# What it says and writes.


def test_it_says_what_was_taken_and_left_out_and_writes_the_same(tmp_path):
    file, out = saved(dino_checkpoint(level("vit256.")), tmp_path / "vit256_small_dino.pth"), tmp_path / "release"
    finished = run_convert("hipt", file, "--out", out, "--num-heads", 6, "--mpp", 0.5)
    assert finished.returncode == 0, finished.stderr
    lines = dict(line.split(maxsplit=1) for line in finished.stdout.splitlines() if " " in line)
    assert lines["taken"].startswith("teacher: a ViT, 30 tensors")
    assert "projection head (8)" in finished.stdout and "student network (38)" in finished.stdout
    assert "heads 6 (--num-heads)" in lines["inferred"]
    assert "14 x 14 positions, interpolated to 16 x 16 by DINO's rule, for 256 px" in lines["inferred"]
    assert lines["input"] == "tiles of 256 px at 0.5 mpp, statistics half, pooling cls"
    report = json.loads((out / "conversion.json").read_text())
    source = report["sources"][0]
    assert (report["format"], report["mpp"], source["network"], source["used"]) == ("hipt", 0.5, "teacher", 30)
    assert source["files"][0]["file"] == file.name and source["files"][0]["bytes"] == file.stat().st_size
    assert len(source["files"][0]["sha256"]) == 64 and source["missing"] == source["unexpected"] == []
    card = (out / "README.md").read_text()
    assert source["files"][0]["sha256"] in card and "left out: 38 of `student network`" in card
    processor = AutoImageProcessor.from_pretrained(out)
    assert (processor.mpp, processor.tile_size, processor.pooling) == (0.5, 256, "cls")


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path):
    file = saved(level("vit4k."), tmp_path / "vit4k.pth")
    finished = run_convert("slpd", file, "--out", tmp_path / "release", "--dry-run")
    assert finished.returncode == 0 and "nothing was written" in finished.stdout and "42 tensors" in finished.stdout
    assert "grids of class tokens of 48 numbers, of tiles of 256 px" in finished.stdout
    assert list(tmp_path.iterdir()) == [file]


def test_what_lies_in_the_folder_already_is_not_lost(tmp_path):
    file, out = saved(level("vit4k."), tmp_path / "vit4k.pth"), tmp_path / "release"
    out.mkdir()
    assert run_convert("hipt", file, "--out", out).returncode == 0  # it was empty
    assert run_convert("hipt", file, "--out", out).returncode == 0  # it is a conversion
    (out / "conversion.json").unlink()
    refused = run_convert("hipt", file, "--out", out)
    assert refused.returncode == 1 and "holds something else already" in refused.stderr
    refused = run_convert("hipt", file, "--out", file)
    assert refused.returncode == 1 and "is a file: pass a folder" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dinov9", "c.pth"], "error: dinov9 is no format that is converted: choose one of dino"),
        (["dino", "nowhere.pth"], "error: nowhere.pth does not exist"),
        (["dino", "c.pth", "--num-heads", "0"], "error: num_heads is 0: it must be at least 1"),
        (["dino", "c.pth", "--mpp", "-1"], "error: mpp is -1.0: it must be a positive number"),
        (["dino", "c.pth", "--max-gb", "0"], "error: max_gb is 0.0: it must be a positive number"),
        (["dino", "c.pth", "--max-gb", "1e-6"], "error: c.pth holds"),
        (["dino", "c.pth"], "error: c.pth: no tensor says how many heads"),
    ],
)
def test_a_mistake_ends_in_one_line_and_writes_nothing(tmp_path, words, message):
    saved(level("vit256."), tmp_path / "c.pth")
    finished = run_command("convert", *words, "--out", "release", cwd=tmp_path)
    assert finished.returncode == 1 and finished.stderr.strip().startswith(message)
    assert len(finished.stderr.strip().splitlines()) == 1 and not (tmp_path / "release").exists()


# What others make of it.


def test_embed_takes_what_was_converted(tmp_path):
    file, out = saved(dino_checkpoint(level("vit256.")), tmp_path / "checkpoint.pth"), tmp_path / "release"
    words = ["--num-heads", 6, "--image-size", 64, "--mpp", 1.0]
    assert run_convert("dino", file, "--out", out, *words).returncode == 0
    write_aperio(tmp_path / "slide.svs", draw_slide(0, "solid", 512)[0], 0.5)
    finished = run_command("embed", tmp_path / "slide.svs", "--encoder", out, "--out", tmp_path / "features")
    assert finished.returncode == 0, finished.stderr
    bag = SlideFeatures.load(tmp_path / "features" / "slide.svs.features.safetensors")
    assert bag.features.shape[1] == 48 and bag.mpp == 1.0


@torch.no_grad()
def test_both_levels_make_the_hierarchy_that_the_original_code_would(tmp_path):
    case = read_case(FIXTURES / "07_hipt_weights.safetensors")
    files = [saved(dino_checkpoint(level(part)), tmp_path / f"{part}pth") for part in ("vit256.", "vit4k.")]
    assert run_convert("hipt", *files, "--out", tmp_path / "release", "--num-heads", 6).returncode == 0
    encoder = load_encoder(tmp_path / "release")
    assert (encoder.size, encoder.region, encoder.mean) == (256, 16, (0.5, 0.5, 0.5))
    pixels = torch.randn(1, 3, 256, 512, generator=torch.Generator().manual_seed(0))
    expected = hipt_model(case.state, case.meta["vit256"], case.meta["vit4k"])(pixels)
    assert_close(encoder.hierarchy(pixels).pooler_output, expected.pooler_output)
    assert encoder.hierarchy.config.white == [1.0, 1.0, 1.0]


def test_a_whole_mae_goes_on_training_and_is_no_encoder_of_tiles(tmp_path):
    case = read_case(FIXTURES / "06_mae_normpix_true.safetensors")
    file, out = saved(mae_checkpoint(case.state), tmp_path / "mae.pth"), tmp_path / "release"
    finished = run_convert("mae-full", file, "--out", out, "--num-heads", 3, "--decoder-heads", 4)
    assert finished.returncode == 0, finished.stderr
    assert type(AutoModelForPreTraining.from_pretrained(out)).__name__ == "ViTMAEForPreTraining"
    assert all(".decoder_encoder." not in name for name in load_file(out / "model.safetensors"))
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
    started = MaeForPreTraining.from_encoder(str(out), MaeConfig(**decoder))
    assert torch.equal(started.encoder.layernorm.weight, case.state["norm.weight"])
    with pytest.raises(UserError, match="hides patches by itself, always: convert its encoder"):
        load_encoder(out)
    finished = run_convert("vit", out, "--out", tmp_path / "encoder")
    assert finished.returncode == 0, finished.stderr
    assert_close(
        dict(load_encoder(tmp_path / "encoder").model.state_dict())["layernorm.weight"], case.state["norm.weight"]
    )


# ViTs in transformers' names.


@pytest.mark.parametrize("form", ["vit", "phikon"])
@pytest.mark.parametrize("container", ["folder", "safetensors", "bin", "parts"])
@pytest.mark.parametrize("names", ["old", "new"])
@torch.no_grad()
def test_a_vit_of_the_hub_gives_the_same_tokens_whatever_its_names_and_files(tmp_path, form, container, names):
    alone = container in ("safetensors", "bin")  # without the config.json that states the epsilon, and the heads
    eps = 1e-6 if alone else 1e-12
    model = small_vit(eps=eps, add_pooling_layer=True, use_mask_token=True)
    folder = tmp_path / "phikon"
    model.save_pretrained(
        folder, save_original_format=names == "old", max_shard_size="50KB" if container == "parts" else "1GB"
    )
    assert (folder / "model.safetensors.index.json").exists() == (container == "parts")
    source, words = folder, []
    if alone:
        source, words = folder / "model.safetensors", ["--num-heads", 4]
    if container == "bin":
        source = saved(load_file(source), folder / "pytorch_model.bin")
    finished = run_convert(form, source, "--out", tmp_path / "release", *words)
    assert finished.returncode == 0, finished.stderr
    assert "mask token (1), pooler (2)" in finished.stdout
    release, loading = AutoModel.from_pretrained(tmp_path / "release", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert release.config.layer_norm_eps == eps
    assert_close(release(pixels).last_hidden_state, model(pixels).last_hidden_state, atol=1e-6, rtol=0)
    assert torch.equal(release(pixels).pooler_output, release(pixels).last_hidden_state[:, 0])


@torch.no_grad()
def test_a_classifier_of_the_hub_gives_its_trunk(tmp_path):
    model = small_vit(ViTForImageClassification)
    model.save_pretrained(tmp_path / "classifier")
    finished = run_convert("vit", tmp_path / "classifier", "--out", tmp_path / "release")
    assert finished.returncode == 0, finished.stderr
    assert "classifier (2)" in finished.stdout
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = AutoModel.from_pretrained(tmp_path / "release")(pixels).last_hidden_state
    assert_close(tokens, model.vit(pixels).last_hidden_state)


@torch.no_grad()
def test_another_image_size_is_baked_as_transformers_interpolates(tmp_path):
    model = small_vit(add_pooling_layer=False)
    model.save_pretrained(tmp_path / "vit")
    finished = run_convert("vit", tmp_path / "vit", "--out", tmp_path / "release", "--image-size", 48)
    assert finished.returncode == 0, finished.stderr
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    tokens = AutoModel.from_pretrained(tmp_path / "release")(pixels).last_hidden_state
    assert_close(tokens, model(pixels, interpolate_pos_encoding=True).last_hidden_state)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"model_type": "dinov2"}, "is a dinov2 by its config.json: only a vit is converted, others load as they are"),
        ({"num_attention_heads": 5}, "5 heads do not divide the width of 48"),
        ({"num_attention_heads": "many"}, "many heads do not divide the width of 48"),
        ({"layer_norm_eps": "small"}, "says 'small' as layer_norm_eps"),
        ({"hidden_act": "os.system"}, "says 'os.system' as hidden_act"),
    ],
)
def test_a_config_that_fits_no_vit_is_told_in_one_line(tmp_path, stated, message):
    small_vit(add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**config, **stated}))
    refused = run_convert("vit", tmp_path / "vit", "--out", tmp_path / "release")
    assert refused.returncode == 1 and message in refused.stderr and len(refused.stderr.strip().splitlines()) == 1


def test_an_incomplete_file_is_refused_and_nothing_is_left_behind(tmp_path):
    weights = {name: tensor.contiguous() for name, tensor in small_vit(add_pooling_layer=False).state_dict().items()}
    save_file(
        {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}, tmp_path / "c.safetensors"
    )
    refused = run_convert("vit", tmp_path / "c.safetensors", "--out", tmp_path / "release")
    assert refused.returncode == 1 and "lacks 4 of 38 tensors" in refused.stderr
    assert not (tmp_path / "release").exists() and list(tmp_path.iterdir()) == [tmp_path / "c.safetensors"]


def test_no_code_of_a_folder_is_run(tmp_path):
    folder: Path = tmp_path / "vit"
    small_vit(add_pooling_layer=False).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    finished = run_convert("vit", folder, "--out", tmp_path / "release")
    assert finished.returncode == 0 and not (tmp_path / "marker").exists()
    assert "auto_map" not in json.loads((tmp_path / "release" / "config.json").read_text())
