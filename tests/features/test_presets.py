"""Encoders as they are published: presets, timm's checkpoints, access. Small models of the same architectures."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from hf_pathology.errors import UserError
from hf_pathology.features import presets
from hf_pathology.features.embed import check_resolution
from hf_pathology.features.encoder import load_encoder
from hf_pathology.features.presets import PRESETS, ConvStem, Preset, preset_of
from hf_pathology.hub_upload.export import export_encoder


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "no_embed_class": True}
SMALL_VIT |= {"mlp_ratio": 2.66667 * 2}
SMALL_SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def write_timm(folder: Path, architecture: str, weights: dict, size: int, arguments: dict) -> Path:
    """A repository as timm writes it: raw weights, and a configuration without what JSON cannot hold."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    cfg = {"input_size": [3, size, size], "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "num_classes": 0}
    config = {"architecture": architecture, "num_classes": 0, "model_args": arguments, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def vit_with(timm, registers: int, **more):
    """A ViT as UNI2-h, Virchow2 and H-optimus are: registers, SwiGLU, scaled layers."""
    torch.manual_seed(0)
    swiglu = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    options = {**SMALL_VIT, **swiglu, "reg_tokens": registers, "init_values": 1e-5, **more}
    return timm.create_model("vit_giant_patch14_224", pretrained=False, num_classes=0, **options).eval()


def tiles_of(size: int) -> torch.Tensor:
    return torch.randint(0, 255, (3, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "registers", "pooling", "mpp", "other_mpp"),
    [
        ("UNI2-h", 8, "cls", 0.5, ()),
        ("Virchow", 0, "cls+mean", 0.5, ()),
        ("Virchow2", 4, "cls+mean", 0.5, (0.25, 1.0, 2.0)),
    ],
)
def test_timm_vits_are_built_as_their_cards_say_and_registers_are_left_out(
    timm, tmp_path, monkeypatch, name, registers, pooling, mpp, other_mpp
):
    card = next(preset for prefix, preset in PRESETS.items() if prefix.endswith(f"/{name}"))
    monkeypatch.setitem(PRESETS, name, card)
    model = vit_with(timm, registers)
    folder = write_timm(
        tmp_path / name, "vit_giant_patch14_224", model.state_dict(), 32, {**SMALL_VIT, "num_classes": 0}
    )
    encoder, tiles = load_encoder(folder), tiles_of(32)
    assert (encoder.pooling, encoder.size, encoder.mpp, encoder.other_mpp) == (pooling, 32, mpp, other_mpp)
    assert encoder.mean == (0.5, 0.4, 0.3) and encoder.prefix_tokens == 1 + registers  # the release's own statistics
    tokens = model.forward_features(encoder.pixels(tiles))
    assert tokens.shape[1] == 1 + registers + 16
    expected = tokens[:, 0]
    if pooling == "cls+mean":
        expected = torch.cat([expected, tokens[:, 1 + registers :].mean(dim=1)], dim=1)
    torch.testing.assert_close(encoder(tiles), expected.detach())


def test_a_timm_release_whose_configuration_is_incomplete_is_refused_not_half_loaded(timm, tmp_path):
    weights = vit_with(timm, 0, mlp_layer=timm.layers.Mlp, act_layer=torch.nn.GELU).state_dict()
    folder = write_timm(tmp_path / "unknown", "vit_giant_patch14_224", weights, 32, SMALL_VIT)
    with pytest.raises(UserError, match=r"unknown has weights that its architecture, .*, does not use \(.*ls1.gamma"):
        load_encoder(folder, pooling="cls")


@pytest.mark.parametrize("layout", ["timm's", "the authors'"])
def test_ctranspath_is_a_swin_with_a_convolutional_stem_in_either_layout_of_its_weights(
    timm, tmp_path, monkeypatch, layout
):
    name = "swin_tiny_patch4_window7_224.CTransPath"
    torch.manual_seed(0)
    model = timm.create_model(name.partition(".")[0], embed_layer=ConvStem, num_classes=0, **SMALL_SWIN).eval()
    weights = model.state_dict()
    if layout == "the authors'":  # who put the downsampling at the end of a stage
        for stage in (1, 2, 3):
            for key in [key for key in weights if key.startswith(f"layers.{stage}.downsample")]:
                weights[key.replace(f"layers.{stage}", f"layers.{stage - 1}")] = weights.pop(key)
    monkeypatch.setitem(PRESETS, name, PRESETS[f"1aurent/{name}"])
    folder = write_timm(tmp_path / name, name.partition(".")[0], weights, 64, SMALL_SWIN)
    encoder, tiles = load_encoder(folder), tiles_of(64)
    assert (encoder.pooling, encoder.mpp) == ("gap", 1.0)
    torch.testing.assert_close(encoder(tiles), model(encoder.pixels(tiles)).detach())


def test_what_a_release_states_goes_before_the_preset(tmp_path, monkeypatch):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    folder = export_encoder(ViTModel(config, add_pooling_layer=False), tmp_path / "phikon", tile_size=16, mpp=1.0)
    monkeypatch.setitem(PRESETS, "phikon", Preset("a card", "mean", 0.25, other_mpp=(2.0,)))
    encoder = load_encoder(folder)
    assert (encoder.pooling, encoder.mpp, encoder.other_mpp, encoder.size) == ("cls", 1.0, (), 16)


def test_midnight_has_no_processor_and_is_used_as_its_card_says(tmp_path):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "kaiko-ai" / "midnight")
    with pytest.raises(UserError, match="midnight cannot be loaded as an encoder"):
        load_encoder(tmp_path / "kaiko-ai" / "midnight")
    os.rename(tmp_path / "kaiko-ai", tmp_path / "there")
    presets.PRESETS["midnight"] = PRESETS["kaiko-ai/midnight"]
    try:
        encoder = load_encoder(tmp_path / "there" / "midnight")
    finally:
        del presets.PRESETS["midnight"]
    assert encoder.mean == encoder.std == (0.5, 0.5, 0.5) and encoder(tiles_of(28)).shape == (3, 32)
    for mpp in (0.25, 0.5, 1.0, 2.0):
        check_resolution(encoder, mpp)
    with pytest.raises(UserError, match="was trained at 0.5, 0.25, 1.0, 2.0 mpp and the tiles are at 4.0"):
        check_resolution(encoder, 4.0)


def test_the_longest_name_that_fits_decides():
    assert preset_of("paige-ai/Virchow2") is PRESETS["paige-ai/Virchow2"]
    assert preset_of("MahmoodLab/uni") is PRESETS["MahmoodLab/UNI"]
    assert preset_of("bioptimus/H-optimus-1") is PRESETS["bioptimus/H-optimus"]
    assert preset_of("/somewhere/vit256_small_dino") is PRESETS["vit256_small_dino"]
    assert preset_of("someone/else") is None


class Refusing(BaseHTTPRequestHandler):
    """Answers to whether a repository may be read by what its name says."""

    def do_GET(self) -> None:
        status, code = (403, "GatedRepo") if "gated" in self.path else (401, "RepoNotFound")
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """A Hub that gives nobody anything, on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/gated", r"^org/gated is gated: ask for access at https://huggingface.co/org/gated, and log in"),
        ("org/unknown", r"^org/unknown cannot be loaded: the Hub has no such model, or it is private"),
    ],
)
def test_access_is_refused_in_one_line_with_the_remedy(hub, name, message):
    with pytest.raises(UserError, match=message) as refused:
        load_encoder(name)
    assert "\n" not in str(refused.value)


def test_without_network_and_without_a_copy_the_encoder_is_named_at_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(
        UserError, match="org/absent cannot be loaded as an encoder .*couldn't find them in the cached"
    ):
        load_encoder("org/absent")


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    (tmp_path / "hibou").mkdir()
    classes = {"AutoConfig": "code.HibouConfig", "AutoModel": "code.HibouModel"}
    config = {"model_type": "hibou", "auto_map": classes}
    (tmp_path / "hibou" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hibou" / "code.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(UserError, match="hibou comes with code of its own, which is never run here: convert it"):
        load_encoder(tmp_path / "hibou")


def test_an_encoder_in_the_cache_is_used_offline(tmp_path):
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / commit
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    export_encoder(ViTModel(config, add_pooling_layer=False), snapshot, tile_size=16, mpp=1.0)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text(commit)
    code = "from hf_pathology.features.encoder import load_encoder as load; found = load('org/tiny')\n"
    code += "print(found.revision, found.mpp, found.pooling)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [commit, "1.0", "cls"], done.stderr


def test_a_path_that_does_not_exist_is_no_hub_id_and_is_not_looked_for_there(tmp_path):
    with pytest.raises(UserError, match="nowhere cannot be loaded: it is no directory, and cannot be the id"):
        load_encoder(tmp_path / "run" / "nowhere")
