"""Releases of a few thousand weights for the tests of this folder, and processes for which the tests' Hub is the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from loopback_hub import TOKEN, LoopbackHub, hub_environment
from transformers import ViTConfig, ViTModel

from hf_pathology.hub_upload.export import export_encoder


CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
---

# A card

encoder = AutoModel.from_pretrained("PATH_OR_ID")

Licence: not stated by those who trained it.
"""


def small_vit(seed: int = 0) -> ViTModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6), add_pooling_layer=False)


def release_encoder(folder: Path, seed: int = 0, card: str | None = CARD) -> Path:
    return export_encoder(small_vit(seed), folder, tile_size=32, mpp=0.5, card=card)


def run_python(
    hub: LoopbackHub, home: Path, *words: object, token: str | None = TOKEN, **environment: str
) -> subprocess.CompletedProcess:
    """Python with these words, in a process of its own that works in `home` and is logged in with `token`."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**hub_environment(os.environ, hub, home, token), "OMP_NUM_THREADS": "1", **environment},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


COMMANDS = """
import json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from hf_pathology.cli import main
for words in json.loads(sys.argv[1]):
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
    sys.argv, code, out, err = ["hf-pathology", *words], 0, StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def run_commands(hub: LoopbackHub, home: Path, *commands: list) -> list[subprocess.CompletedProcess]:
    """`hf-pathology` with the words of each command, one after the other in one process for which `hub` is the Hub.

    A command may begin with words such as HF_TOKEN=..., which hold from there on.
    """
    words = json.dumps([[str(word) for word in command] for command in commands])
    ran = run_python(hub, home, "-c", COMMANDS, words)
    assert ran.returncode == 0, ran.stderr
    return [subprocess.CompletedProcess([], *json.loads(line)) for line in ran.stdout.splitlines()]
