"""The second level of the hierarchy as a user trains it: it learns, is killed and goes on, and both levels are released."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launched_runs import assert_a_killed_run_ends_as_one_that_was_not, launcher
from programs import run_recipe_here
from region_features import REGION, TILE, make_region_features
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from hf_pathology.features.encoder import load_encoder
from hf_pathology.features.grid_crops import GridCropOptions, GridCrops
from hf_pathology.features.region_blocks import RegionBlocks
from hf_pathology.modeling.modeling_hipt import HiptModel, HiptRegionModel
from hf_pathology.recipes import pretrain_hipt4k
from hf_pathology.slides.reader import Slide
from hf_pathology.training.log import read_log


CONFIG = Path(__file__).resolve().parents[2] / "recipes" / "configs" / "hipt4k_tiny.yaml"
SHORT = ["--steps", "8", "--warmup_steps", "2", "--checkpoint_every", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of features, and the release of the tile encoder."""
    return make_region_features(tmp_path_factory.mktemp("regions"))


def words(features: Path, out: Path, *more) -> list[str]:
    return ["--config", str(CONFIG), "--features", str(features), "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def run(made, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    pretrain_hipt4k.main(words(made[0], out))
    return out


def test_the_tiny_configuration_trains_and_releases_both_levels(made, run):
    panels = [record for record in read_log(run / "log.jsonl") if "kl" in record]
    assert len(panels) == 5 and all(np.isfinite(panel["loss"]) for panel in panels)
    encoder, loading = AutoModel.from_pretrained(run / "encoder", output_loading_info=True)
    assert type(encoder) is HiptModel and not loading["missing_keys"] and not loading["unexpected_keys"]
    assert encoder.config.tile_revision == load_encoder(made[1]).revision
    tiles = AutoModel.from_pretrained(made[1])
    for name, weight in encoder.tile_encoder.state_dict().items():
        assert torch.equal(weight, tiles.state_dict()[name]), name
    card = (run / "encoder" / "README.md").read_text()
    assert f"a region of {REGION * TILE} x {REGION * TILE} pixels at 0.5 microns per pixel" in card
    assert "slides: 3" in card and "trust_remote_code=True" in card


@torch.no_grad()
def test_the_release_gives_the_features_of_the_store_and_a_region(made, run):
    """From the pixels of a region, by the release's own processor, come the features of its tiles that were stored."""
    regions = RegionBlocks(made[0])
    encoder = AutoModel.from_pretrained(run / "encoder")
    processor = AutoImageProcessor.from_pretrained(run / "encoder")
    with Slide(made[0].parent / "slides" / regions.slides[0]) as slide:
        pixels, _ = slide.read_tiles(regions.xy[:1], REGION * TILE, (float(REGION * TILE), float(REGION * TILE)))
    output = encoder(**processor(list(pixels), return_tensors="pt"))
    np.testing.assert_allclose(output.tile_features[0].permute(1, 2, 0), regions[0], atol=1e-5)
    alone = encoder.region_encoder(torch.from_numpy(regions[0].copy()).permute(2, 0, 1)[None])
    torch.testing.assert_close(alone.pooler_output, output.pooler_output, atol=1e-5, rtol=1e-4)


def test_the_release_loads_where_the_package_is_not_installed(run, tmp_path):
    code = f"""
import sys
sys.meta_path = [each for each in sys.meta_path if "editable" not in repr(each).lower()]
sys.path = [path for path in sys.path if path and "site-packages" in path or "lib/python" in path or path.endswith(".zip")]
sys.modules["hf_pathology"] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(run / "encoder")!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
print(tuple(model(torch.zeros(1, 3, 64, 96)).last_hidden_state.shape))
"""
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 7, 24)"


def test_training_goes_on_from_a_released_region_encoder_and_it_is_released_alone(made, run, tmp_path):
    pretrain_hipt4k.main(words(made[0], tmp_path / "one", "--tile_encoder", "none", "--steps", 4, "--warmup_steps", 1))
    alone, loading = AutoModel.from_pretrained(tmp_path / "one" / "encoder", output_loading_info=True)
    assert type(alone) is HiptRegionModel and not loading["missing_keys"]
    start = ["--encoder", tmp_path / "one" / "encoder", "--steps", 2, "--warmup_steps", 2]
    pretrain_hipt4k.main(words(made[0], tmp_path / "two", *start))
    again = AutoModel.from_pretrained(tmp_path / "two" / "encoder").region_encoder
    moved = [(a - b).abs().max() for a, b in zip(alone.parameters(), again.parameters())]
    assert 0 < max(moved) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bits(made, tmp_path, processes):
    launched = launcher("pretrain_hipt4k.py", processes)
    assert_a_killed_run_ends_as_one_that_was_not(lambda out: [*launched, *words(made[0], out, *SHORT)], tmp_path)


def test_tensors_of_hipt_are_trained_on_and_released_with_the_encoder_that_is_named(made, tmp_path):
    regions = RegionBlocks(made[0])
    (tmp_path / "tensors").mkdir()
    for number in range(len(regions)):
        grid = torch.from_numpy(regions[number].copy()).flatten(0, 1)
        torch.save(grid, tmp_path / "tensors" / f"{regions.slides[regions.slide_of[number]]}_{number}.pt")
    start = words(tmp_path / "tensors", tmp_path / "run", "--steps", 2, "--warmup_steps", 1)
    done = run_recipe_here(pretrain_hipt4k.main, *start)
    assert done.returncode == 1 and "pass --tile_encoder none to release the region encoder alone" in done.stderr
    pretrain_hipt4k.main([*start, "--tile_encoder", str(made[1])])
    released = AutoModel.from_pretrained(tmp_path / "run" / "encoder")
    assert type(released) is HiptModel and released.config.tile_size == TILE


def test_a_step_depends_on_the_region_and_the_epoch_not_on_the_batch(made):
    regions = RegionBlocks(made[0])
    crops = GridCrops(GridCropOptions(global_size=3, local_size=2, vertical_flip=True, quarter_turns=True), seed=0)
    row = {"tile": regions[1], "slide": "0.svs", "xy": regions.xy[1], "epoch": 0}
    one, same, later = crops(row), crops(row), crops({**row, "epoch": 1})
    assert one["global_views"].shape == (2, 16, 3, 3) and one["local_views"].shape == (8, 16, 2, 2)
    assert all((one[name] == same[name]).all() for name in one)
    assert any((one[name] != later[name]).any() for name in one)


def test_crops_are_pieces_of_the_grid_and_their_mirror_images(made):
    grid = np.arange(4 * 4 * 2, dtype=np.float32).reshape(4, 4, 2)
    crops = GridCrops(GridCropOptions(global_size=3, local_size=2, local_views=400), seed=0)
    views = crops({"tile": grid, "slide": "a", "xy": (0, 0), "epoch": 0})["local_views"].transpose(0, 2, 3, 1)
    pieces = [grid[i : i + 2, j : j + 2] for i in range(3) for j in range(3)]
    expected = {piece.tobytes() for each in pieces for piece in (each, each[:, ::-1].copy())}
    assert {np.ascontiguousarray(view).tobytes() for view in views} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--global_size", "5"], "global_size is 5, but a region has only 4 tiles along an edge"),
        (["--features", "nothing"], "nothing holds no features of slides"),
        (["--hidden_size", "25"], "hidden_size is 25: it must be a multiple of num_attention_heads, 2"),
        (["--tile_encoder", "missing/dir/of/three"], "missing/dir/of/three cannot be loaded"),
        (["--splits", "train"], "splits are chosen, but no table says them"),
        (["--limit", "0"], "limit is 0"),
    ],
)
def test_a_mistake_is_one_line(made, tmp_path, options, message):
    done = run_recipe_here(pretrain_hipt4k.main, *words(made[0], tmp_path / "out"), *options)
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_encoder_that_was_changed_since_is_refused(made, run, tmp_path):
    done = run_recipe_here(
        pretrain_hipt4k.main, *words(made[0], tmp_path / "out"), "--tile_encoder", run.parent / "nowhere"
    )
    assert done.returncode == 1 and "cannot be loaded" in done.stderr
    changed = tmp_path / "changed"
    shutil.copytree(made[1], changed)
    weights = load_file(changed / "model.safetensors")
    weights["layernorm.bias"] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    done = run_recipe_here(pretrain_hipt4k.main, *words(made[0], tmp_path / "out"), "--tile_encoder", changed)
    assert done.returncode == 1 and "has the revision" in done.stderr
