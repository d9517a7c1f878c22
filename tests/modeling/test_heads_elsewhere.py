"""Every head loads from what was saved where this package is not installed, by the code that came with it."""

import os
import subprocess
import sys

import torch
from torch.testing import assert_close

from hf_pathology.modeling.configuration_hipt_slide import HiptSlideConfig
from hf_pathology.modeling.modeling_hipt_slide import HiptForSlideClassification
from hf_pathology.recipes.slide_heads import OVER_TILES


WIDTH, TILES = 8, 9  # of a feature vector; in a region
LAYERS = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "grid_size": 3}
LOAD_AND_RUN = """
import sys
sys.modules["hf_pathology"] = None
import torch
from transformers import AutoModel
for name in sys.argv[1:]:
    head = AutoModel.from_pretrained(name, trust_remote_code=True)  # the test wrote the code that is run here
    with torch.inference_mode():
        torch.save(head(torch.load("features.pt")).logits, f"{name}.pt")
"""


def test_heads_load_as_remote_code_where_the_package_cannot_be_imported(tmp_path):
    torch.manual_seed(0)
    heads = {name: head(config(input_dim=WIDTH)) for name, (config, head) in OVER_TILES.items()}
    for name, options in {
        "hipt": {"region_tiles": TILES, "region_config": LAYERS},
        "hipt_attention": {"region_tiles": TILES, "local": "attention"},
        "hipt_regions": {"region_tiles": 1},
    }.items():
        heads[name] = HiptForSlideClassification(HiptSlideConfig(input_dim=WIDTH, hidden_size=12, **options))
    features = torch.randn(2, 2 * TILES, WIDTH)
    torch.save(features, tmp_path / "features.pt")
    for name, head in heads.items():
        head.eval().save_pretrained(tmp_path / name)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, "-c", LOAD_AND_RUN, *heads]
    subprocess.run(program, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for name, head in heads.items():
        with torch.inference_mode():
            assert_close(torch.load(tmp_path / f"{name}.pt"), head(features).logits, atol=1e-6, rtol=0, msg=name)
