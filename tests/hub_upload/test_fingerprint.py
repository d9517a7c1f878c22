"""A release and its fingerprint, here and in a process that knows nothing of this package."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hierarchies import release_hierarchy
from releases import release_encoder, small_vit
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    ViTForImageClassification,
)

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.clean_process import verify_in_clean_process
from hf_pathology.hub_upload.export import export_encoder, release_processor, write_release
from hf_pathology.hub_upload.export_hipt import export_region_encoder
from hf_pathology.hub_upload.fingerprint import compare, fingerprint_of, numbers, pixels, sha256
from hf_pathology.modeling import AbmilConfig, AbmilForSlideClassification, HiptForSlideClassification, HiptSlideConfig
from hf_pathology.recipes.slide_heads import save_head


def write_hipt(folder: Path) -> None:
    release_hierarchy(folder)


def write_region(folder: Path) -> None:
    model = AutoModel.from_pretrained(release_hierarchy(folder.with_name("both")))
    export_region_encoder(model.region_encoder, folder)


def write_abmil(folder: Path) -> None:
    save_head(AbmilForSlideClassification(AbmilConfig(input_dim=16)), folder)


def write_hipt_slide(folder: Path) -> None:
    save_head(HiptForSlideClassification(HiptSlideConfig(input_dim=16, region_tiles=9, local="attention")), folder)


def write_resnet(folder: Path) -> None:
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    export_encoder(model, folder, tile_size=64, mpp=0.5, pooling="gap")


def write_dinov2(folder: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    export_encoder(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)), folder, tile_size=28, mpp=None)


def write_classifier(folder: Path) -> None:
    folder.mkdir()
    half = [0.5, 0.5, 0.5]
    write_release(
        ViTForImageClassification(small_vit().config),
        release_processor(tile_size=32, mpp=0.5, mean=half, std=half),
        folder,
    )


KINDS = {
    "vit": (release_encoder, "tile", {"pooler_output": 32, "mean": 32}),
    "resnet": (write_resnet, "tile", {"pooler_output": 16, "mean": 16}),
    "dinov2": (write_dinov2, "tile", {"pooler_output": 16, "mean": 16}),
    "classifier": (write_classifier, "tile", {"logits": 2}),
    "hipt": (write_hipt, "region", {"pooler_output": 12, "tile_mean": 16, "mean": 12}),
    "region": (write_region, "grid", {"pooler_output": 12, "mean": 12}),
    "abmil": (write_abmil, "bag", {"slide_embedding": 128, "logits": 2}),
    "hipt_slide": (write_hipt_slide, "bag", {"slide_embedding": 256, "logits": 2}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_release_carries_a_fingerprint_that_it_gives_again(tmp_path, kind):
    write, of, widths = KINDS[kind]
    write(tmp_path / "release")
    stated = json.loads((tmp_path / "release" / "fingerprint.json").read_text())
    assert stated["input"]["kind"] == of
    assert {name: len(feature["values"]) for name, feature in stated["features"].items()} == widths
    assert all(np.std(feature["values"]) > 0 for feature in stated["features"].values())
    assert list(stated["weights"]) == ["model.safetensors"]
    assert compare(fingerprint_of(tmp_path / "release"), stated) == "the same bits"


def test_the_input_is_the_same_on_every_machine():
    assert sha256(pixels(32, 48)) == "6b19f215b1b50d0a5491718329102fa12c124ace6a16520f41ec5686c739e893"
    assert sha256(numbers(2, 3, 5)) == "133a7ea54bc2ac82664d498a6cf9a726bfdcb02e4b24c9d0beb2179d665f7bae"
    assert pixels(224, 224).std() > 60 and len(np.unique(pixels(224, 224))) == 256


def test_a_fingerprint_is_what_the_model_says_of_the_pixels_through_the_processor(tmp_path):
    folder = release_encoder(tmp_path / "release")
    inputs = AutoImageProcessor.from_pretrained(folder)(pixels(32, 32), return_tensors="pt")
    with torch.inference_mode():
        output = AutoModel.from_pretrained(folder).eval()(**inputs)
    features = json.loads((folder / "fingerprint.json").read_text())["features"]
    for name, expected in {
        "pooler_output": output.pooler_output[0],
        "mean": output.last_hidden_state[0].mean(dim=0),
    }.items():
        np.testing.assert_allclose(features[name]["values"], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_other_weights_rounded_weights_and_other_statistics_are_noticed(tmp_path):
    folder = release_encoder(tmp_path / "release")
    stated = fingerprint_of(folder)
    weights = load_file(folder / "model.safetensors")

    save_file(
        {name: weight.half().float() for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    rounded = fingerprint_of(folder)
    with pytest.raises(ValueError, match="the weights are not those of the fingerprint: model.safetensors"):
        compare(rounded, stated)
    with pytest.raises(ValueError, match="the features differ by"):
        compare({**rounded, "weights": stated["weights"]}, stated)

    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "image_std": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match="the features differ by"):
        compare(fingerprint_of(folder), stated)
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "size": {"height": 16, "width": 16}}))
    with pytest.raises(ValueError, match="another"):
        compare({**stated, "input": {"sha256": sha256(pixels(16, 16))}}, stated)


def test_features_that_differ_by_less_than_the_tolerance_are_the_same():
    feature = {"values": [3.0, 4.0], "sha256": "a"}
    stated = {"input": {"sha256": "i"}, "weights": {}, "features": {"f": feature}, "tolerance": 1e-4}
    near = {**stated, "features": {"f": {"values": [3.0, 4.0002], "sha256": "b"}}}
    far = {**stated, "features": {"f": {"values": [3.0, 4.001], "sha256": "b"}}}
    assert compare(near, stated) == "the same within 4e-05 of their length"
    with pytest.raises(ValueError, match="differ by 0.0002"):
        compare(far, stated)
    with pytest.raises(ValueError, match="differ by nan"):
        compare({**stated, "features": {"f": {"values": [3.0, float("nan")], "sha256": "b"}}}, stated)


# In a process of its own; the code that is trusted there was written by the test.


def test_a_release_is_verified_where_this_package_cannot_be_imported(tmp_path):
    write_hipt(tmp_path / "release")
    told = verify_in_clean_process(tmp_path / "release", trust_remote_code=True)
    assert told.startswith("loads whole, and its features are the same") and "warns" not in told


def test_code_that_needs_this_package_fails_there_and_no_code_runs_unasked(tmp_path):
    write_abmil(tmp_path / "release")
    code = tmp_path / "release" / "modeling_abmil.py"
    code.write_text(f"import hf_pathology\nopen({str(tmp_path / 'ran')!r}, 'w')\n" + code.read_text())
    with pytest.raises(UserError, match="--trust-remote-code"):
        verify_in_clean_process(tmp_path / "release")
    with pytest.raises(UserError, match="hf_pathology"):
        verify_in_clean_process(tmp_path / "release", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_broken_weights_are_named_in_one_line(tmp_path):
    folder = release_encoder(tmp_path / "release")
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="weights that are not finite: layernorm.weight") as raised:
        verify_in_clean_process(folder)
    assert "\n" not in str(raised.value)


def test_the_script_needs_only_the_file_beside_it(tmp_path):
    folder = release_encoder(tmp_path / "release")
    for name in ("verify_release", "fingerprint"):
        shutil.copy(find_spec(f"hf_pathology.hub_upload.{name}").origin, tmp_path)
    words = [sys.executable, "-I", tmp_path / "verify_release.py", folder]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0 and json.loads(ran.stdout)["agreement"].startswith("the same"), ran.stderr
