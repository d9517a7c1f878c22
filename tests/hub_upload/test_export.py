import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTModel

from hf_pathology.hub_upload.export import export_encoder, release_model


def encoder(**changes) -> ViTModel:
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(**config, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    return ViTModel(config, **{"add_pooling_layer": False, **changes})


CLEAN_PROCESS = """
import sys, json, warnings
warnings.simplefilter("error")
try:
    import hf_pathology
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is importable")
import torch
from transformers import AutoImageProcessor, AutoModel
model, loading = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"], loading
tile = torch.arange(32 * 32 * 3, dtype=torch.uint8).view(32, 32, 3).numpy()
with torch.inference_mode():
    output = model(**processor(tile, return_tensors="pt"))
assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
print(json.dumps({
    "model": type(model).__module__, "processor": type(processor).__name__, "mpp": processor.mpp,
    "tile_size": processor.tile_size, "pooling": processor.pooling, "features": output.pooler_output[0].tolist(),
}))
"""


def test_a_release_loads_where_this_package_is_not_importable(tmp_path):
    source = encoder(use_mask_token=True)
    export_encoder(source, tmp_path / "release", tile_size=32, mpp=0.5, card="# A card")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    hidden = tmp_path / "site"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\nclass Hide:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'hf_pathology': raise ModuleNotFoundError(name)\nsys.meta_path.insert(0, Hide())\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", CLEAN_PROCESS, str(tmp_path / "release")],
        env={**environment, "PYTHONPATH": str(hidden)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    facts = json.loads(finished.stdout)
    assert facts["model"].startswith("transformers.") and facts["processor"] == "ViTImageProcessor"
    assert (facts["mpp"], facts["tile_size"], facts["pooling"]) == (0.5, 32, "cls")
    tile = torch.arange(32 * 32 * 3, dtype=torch.uint8).view(32, 32, 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((tile / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = source.eval()(pixels).last_hidden_state[0, 0]
    torch.testing.assert_close(torch.tensor(facts["features"]), expected, atol=1e-5, rtol=1e-5)


def test_an_unknown_resolution_is_written_as_null(tmp_path):
    export_encoder(encoder(), tmp_path / "release", tile_size=32, mpp=None)
    written = json.loads((tmp_path / "release" / "preprocessor_config.json").read_text())
    assert "mpp" in written and written["mpp"] is None
    assert AutoImageProcessor.from_pretrained(tmp_path / "release").mpp is None


@pytest.mark.parametrize("changes", [{"use_mask_token": True}, {"add_pooling_layer": True}, {}])
def test_mask_token_and_trained_pooler_stay_behind(tmp_path, changes):
    export_encoder(encoder(**changes), tmp_path / "release", tile_size=32, mpp=0.5)
    model, loading = AutoModel.from_pretrained(tmp_path / "release", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert torch.equal(model.pooler.dense.weight, torch.eye(32))


def test_an_encoder_with_broken_weights_is_not_exported(tmp_path):
    broken = encoder()
    with torch.no_grad():
        broken.layernorm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="layernorm.weight"):
        export_encoder(broken, tmp_path / "release", tile_size=32, mpp=0.5)
    assert list(tmp_path.iterdir()) == []


def test_a_release_travels_through_transformers_own_code_again(tmp_path):
    release_model(encoder()).save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again").eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again(pixels).pooler_output, encoder().eval()(pixels).last_hidden_state[:, 0])
