"""`push_to_hub` of models and processors, as transformers has it, keeps a release whole."""

import json

import torch
from hierarchies import release_hierarchy
from loopback_hub import loopback_hub
from releases import release_encoder, run_python
from transformers import AutoModel

from hf_pathology.modeling import AbmilConfig, AbmilForSlideClassification
from hf_pathology.recipes.slide_heads import save_head


PUSH = """
import sys
import hf_pathology
from transformers import AutoImageProcessor, AutoModel
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    AutoModel.from_pretrained(folder).push_to_hub(name)
    if "head" not in name:
        AutoImageProcessor.from_pretrained(folder).push_to_hub(name)
"""
LOAD = """
import json, sys, warnings
warnings.simplefilter("error")
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_pathology":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoImageProcessor, AutoModel
encoder, processor = AutoModel.from_pretrained("org/encoder"), AutoImageProcessor.from_pretrained("org/encoder")
# The test pushed the code that is run here.
hierarchy = AutoModel.from_pretrained("org/hipt", trust_remote_code=True)
head = AutoModel.from_pretrained("org/head", trust_remote_code=True)
with torch.inference_mode():
    features = encoder.eval()(torch.ones(1, 3, 32, 32)).pooler_output
    regions = hierarchy.eval()(torch.ones(1, 3, 64, 32)).pooler_output
    logits = head.eval()(torch.ones(1, 5, 16)).logits
print(json.dumps([features.tolist(), regions.tolist(), logits.tolist(), processor.mpp, processor.pooling]))
"""


def test_pushed_models_load_elsewhere_with_their_code_and_their_processor(tmp_path):
    release_encoder(tmp_path / "encoder")
    release_hierarchy(tmp_path / "hipt")
    torch.manual_seed(0)
    save_head(AbmilForSlideClassification(AbmilConfig(input_dim=16)), tmp_path / "head")
    with torch.inference_mode():
        known = [
            AutoModel.from_pretrained(tmp_path / "encoder").eval()(torch.ones(1, 3, 32, 32)).pooler_output,
            AutoModel.from_pretrained(tmp_path / "hipt").eval()(torch.ones(1, 3, 64, 32)).pooler_output,
            AutoModel.from_pretrained(tmp_path / "head").eval()(torch.ones(1, 5, 16)).logits,
        ]
    with loopback_hub() as hub:
        names = ("encoder", "hipt", "head")
        pushed = run_python(
            hub, tmp_path, "-c", PUSH, *(each for name in names for each in (tmp_path / name, f"org/{name}"))
        )
        assert pushed.returncode == 0, pushed.stderr
        ran = run_python(hub, tmp_path, "-I", "-c", LOAD)
    assert ran.returncode == 0, ran.stderr
    *found, mpp, pooling = json.loads(ran.stdout)
    for values, expected in zip(found, known):
        torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-5, atol=1e-6)
    assert (mpp, pooling) == (0.5, "cls")
    for name in names:
        sent, kept = hub.model(f"org/{name}").files, tmp_path / name
        assert sent["model.safetensors"] == (kept / "model.safetensors").read_bytes()
        assert {file for file in sent if file.endswith(".py")} == {file.name for file in kept.glob("*.py")}
