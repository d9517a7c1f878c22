"""The recipe as a user runs it: launched, killed, launched again, on one process and on two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launched_runs import RECIPES, assert_a_killed_run_ends_as_one_that_was_not, environment, launcher, weights
from programs import run_recipe_here
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTModel

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.recipes import pretrain_ibot
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.training.log import read_log


RECIPE = str(RECIPES / "pretrain_ibot.py")
SMALL = """
mpp: 1.0
tile_size: 32
global_size: 32
local_size: 16
local_views: 2
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 2
patch_size: 8
out_dim: 64
head_hidden_dim: 32
head_bottleneck_dim: 16
drop_path_rate: 0.1
steps: 8
batch_size: 8
learning_rate: 1.0e-2
warmup_steps: 2
log_every: 1
panel_every: 4
checkpoint_every: 2
window: 8
cpu: true
"""


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for index, label in enumerate(("glandular", "solid")):
        write_aperio(folder / f"{label}.svs", draw_slide(index, label, 768)[0], 0.5)
    return folder


def command(launched, slides, out, *options) -> list[str]:
    config = Path(out).parent / "small.yaml"
    config.write_text(SMALL)
    return [*launched, "--config", str(config), "--slides", str(slides), "--out", str(out), *options]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_bits(slides, tmp_path, processes):
    launched = launcher("pretrain_ibot.py", processes)
    assert_a_killed_run_ends_as_one_that_was_not(lambda out: command(launched, slides, out), tmp_path)
    encoder, loading = AutoModel.from_pretrained(tmp_path / "killed" / "encoder", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert torch.equal(encoder.layernorm.weight, weights(tmp_path / "killed")["teacher.layernorm.weight"])
    card = (tmp_path / "killed" / "encoder" / "README.md").read_text()
    assert "iBOT" in card and "slides: 2; cases: not recorded" in card
    assert_each_process_read_its_own_tiles(tmp_path / "straight", processes)


def assert_each_process_read_its_own_tiles(out: Path, processes: int) -> None:
    """That the windows of the ranks take turns."""
    checkpoint = out / "checkpoints" / "step_00000008"
    assert json.loads((checkpoint / "checkpoint.json").read_text())["world_size"] == processes
    places = [json.loads((checkpoint / f"data_{rank}.json").read_text())["places"] for rank in range(processes)]
    assert [own[0][0] % processes for own in places] == list(range(processes))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_the_run_and_ends_it(slides, tmp_path, number):
    words = [sys.executable, *command([RECIPE], slides, tmp_path / "run", "--steps", "2000", "--log_every", "1")]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while len(read_log(log)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    steps = int(said.rsplit("stopped after step ", 1)[1].split(";")[0])
    assert (tmp_path / "run" / "checkpoints" / f"step_{steps:08d}").is_dir() and "Traceback" not in said


def test_a_run_that_starts_from_a_release_keeps_its_statistics_and_refuses_other_tiles(slides, tmp_path):
    torch.manual_seed(0)
    trunk = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8
    )
    vit = ViTModel(trunk, add_pooling_layer=False)
    half = [0.5, 0.5, 0.5]
    export_encoder(vit, tmp_path / "release", tile_size=32, mpp=1.0, mean=half, std=half)
    start = ["--encoder", str(tmp_path / "release")]
    pretrain_ibot.main(command([], slides, tmp_path / "run", *start, "--steps", "1", "--workers", "0"))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / "encoder")
    assert list(processor.image_mean) == half and list(processor.image_std) == half
    encoder = AutoModel.from_pretrained(tmp_path / "run" / "encoder")
    # One step at a learning rate of 0: the teacher still is the release.
    assert torch.equal(encoder.layernorm.weight, vit.layernorm.weight)
    with pytest.raises(UserError, match="was trained at 1.0 mpp and the tiles are at 0.5"):
        pretrain_ibot.main(command([], slides, tmp_path / "other", *start, "--mpp", "0.5"))
    with pytest.raises(UserError, match="takes views of 32 px: choose --global_size 32"):
        pretrain_ibot.main(command([], slides, tmp_path / "third", *start, "--global_size", "64"))


def test_slides_that_cannot_be_used_are_named_and_the_exit_code_says_so(slides, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for slide in slides.iterdir():
        os.link(slide, folder / slide.name)
    (folder / "broken.svs").write_bytes(b"nothing")
    finished = run_recipe_here(pretrain_ibot.main, *command([], folder, tmp_path / "run", "--steps", "1"))
    assert finished.returncode == 1
    assert "left out:" in finished.stderr and "broken.svs is no slide that OpenSlide can open" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slides", "nowhere"], "error: nowhere does not exist"),
        (["--encoder", "nowhere"], "error: nowhere cannot be loaded as an encoder"),
        (["--steps", "0"], "error: steps is 0: it must be at least 1"),
        (["--batch_size", "0"], "error: batch_size is 0"),
        (["--workers", "-1"], "error: workers is -1"),
        (["--global_size", "50"], "error: global_size is 50: it must be a multiple of patch_size, 8"),
        (["--hidden_size", "33"], "error: hidden_size is 33: it must be a multiple"),
        (["--tile_size", "5000"], "is smaller than one tile"),
    ],
)
def test_a_mistake_ends_in_one_line(slides, tmp_path, options, message):
    finished = run_recipe_here(pretrain_ibot.main, *command([], slides, tmp_path / "run", *options))
    assert finished.returncode == 1
    assert message in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--global_size", "50"],
        ["--judge_every", "5"],
        ["--judge", "nowhere", "--judge_every", "5"],
        ["--trunk", "resnet"],
    ],
)
def test_a_mistake_of_the_model_or_the_judge_is_told_before_any_slide_is_read(slides, tmp_path, options):
    finished = run_recipe_here(pretrain_ibot.main, *command([], slides, tmp_path / "run", *options))
    assert finished.returncode == 1 and finished.stderr.startswith("error: ") and not (tmp_path / "run").exists()
