"""Released code of ours runs where this package is not: with torch and transformers alone, the oldest and the newest we support.

How these environments are made is told in `foreign_environments.py`.
"""

import json
import os
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
import transformers
from foreign_environments import environment_with
from hierarchies import REGION, TILE, release_hierarchy
from safetensors.torch import load_file, save_file
from transformers import AutoModel, ViTConfig, ViTModel

from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.hub_upload.export_hipt import export_region_encoder
from hf_pathology.modeling.configuration_hipt_slide import HiptSlideConfig
from hf_pathology.modeling.modeling_hipt_slide import HiptForSlideClassification
from hf_pathology.recipes.slide_heads import OVER_TILES, save_head


WIDTH = 16
CLASSES = {"num_labels": 2, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
REGIONS = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def floor() -> str:
    """The oldest transformers that setup.cfg allows."""
    config = ConfigParser()
    config.read(Path(__file__).resolve().parents[2] / "setup.cfg")
    oldest = re.search(r"^transformers>=([\d.]+)$", config["options"]["install_requires"], re.MULTILINE)[1]
    return oldest + ".0" * (2 - oldest.count("."))


pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("version", [floor(), transformers.__version__], indirect=True, scope="module"),
]


@pytest.fixture(scope="module")
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def python(version) -> Path:
    """The Python of an environment with this transformers."""
    return environment_with(f"transformers=={version}")


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A folder with a release of each kind, and `inputs.safetensors` for them."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    release_hierarchy(folder / "hipt")
    export_region_encoder(AutoModel.from_pretrained(folder / "hipt").region_encoder, folder / "hipt_region")
    for name, (config, head) in OVER_TILES.items():
        save_head(head(config(input_dim=WIDTH, **CLASSES)), folder / name)
    for local in ("transformer", "attention"):
        regions = {"region_config": {**REGIONS, "grid_size": REGION}} if local == "transformer" else {}
        shape = {"input_dim": WIDTH, "region_tiles": REGION**2, "hidden_size": 12}
        config = HiptSlideConfig(**shape, local=local, **regions, **CLASSES)
        save_head(HiptForSlideClassification(config), folder / f"hipt_slide_{local}")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    export_encoder(
        ViTModel(ViTConfig(**shape, image_size=TILE, patch_size=8)), folder / "vit", tile_size=TILE, mpp=0.5
    )
    mask = torch.rand(2, 2 * REGION**2) > 0.2
    inputs = {
        "pixels": torch.randn(1, 3, REGION * TILE, REGION * TILE),
        "tile": torch.randn(1, 3, TILE, TILE),
        "grid": torch.randn(2, WIDTH, REGION, REGION),
        "bag": torch.randn(2, 2 * REGION**2, WIDTH),
        "mask": mask,
    }
    save_file(inputs, folder / "inputs.safetensors")
    return folder


INPUTS = {
    "hipt": ["pixels"],
    "hipt_region": ["grid"],
    **{name: ["bag", "mask"] for name in OVER_TILES},
    "hipt_slide_transformer": ["bag", "mask"],
    "hipt_slide_attention": ["bag", "mask"],
    "vit": ["tile"],
}
OURS = [kind for kind in INPUTS if kind != "vit"]

LOAD_AND_RUN = """
import json, sys
from importlib.util import find_spec
folder, inputs_of = sys.argv[1], json.loads(sys.argv[2])
there = [name for name in ("hf_pathology", "torchvision", "PIL", "accelerate", "peft", "sklearn") if find_spec(name)]
assert not there, there
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
torch.set_num_threads(1)
inputs, outputs = load_file(f"{folder}/inputs.safetensors"), {}
for kind, names in inputs_of.items():
    trust = {} if kind == "vit" else {"trust_remote_code": True}
    model, loading = AutoModel.from_pretrained(f"{folder}/{kind}", output_loading_info=True, **trust)
    assert not loading["missing_keys"] and not loading["unexpected_keys"], (kind, loading)
    assert type(model).__module__.startswith("transformers" if kind == "vit" else "transformers_modules."), type(model)
    with torch.inference_mode():
        output = model(*(inputs[name] for name in names))
    outputs |= {f"{kind} {name}": value.clone(memory_format=torch.contiguous_format) for name, value in output.items() if value is not None}
save_file(outputs, sys.argv[3])
"""

LOAD_WITHOUT_TRUST = """
import sys
from transformers import AutoModel
for kind in sys.argv[2:]:
    try:
        AutoModel.from_pretrained(f"{sys.argv[1]}/{kind}")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        sys.exit(f"{kind} was loaded")
print("all refused")
"""


def run(python: Path, program: str, *words: str, tmp_path: Path) -> str:
    """What the program prints in the environment, where nothing of this checkout is on the path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    options = {"env": environment, "cwd": tmp_path, "stdin": subprocess.DEVNULL}
    done = subprocess.run([python, "-c", program, *words], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_released_gives_the_same_outputs_there(python, version, released, tmp_path):
    run(
        python, LOAD_AND_RUN, str(released), json.dumps(INPUTS), str(tmp_path / "there.safetensors"), tmp_path=tmp_path
    )
    there, inputs = load_file(tmp_path / "there.safetensors"), load_file(released / "inputs.safetensors")
    for kind, names in INPUTS.items():
        with torch.inference_mode():
            here = AutoModel.from_pretrained(released / kind)(*(inputs[name] for name in names))
        found = {name for name, value in here.items() if value is not None}
        assert found == {name.split(" ")[1] for name in there if name.startswith(f"{kind} ")}, kind
        for name in found:
            torch.testing.assert_close(there[f"{kind} {name}"], here[name], atol=1e-5, rtol=1e-5, msg=f"{kind} {name}")


def test_code_that_is_not_trusted_is_not_run(python, version, released, tmp_path):
    assert run(python, LOAD_WITHOUT_TRUST, str(released), *OURS, tmp_path=tmp_path).endswith("all refused\n")
