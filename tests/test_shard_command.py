"""`hf-pathology shard` as a user meets it, and what its page says."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from damage import spoil_tiles
from datasets import load_dataset
from programs import Finished, run_command, run_recipe_here

from hf_pathology.hub_upload.cards.dataset_cards import size_category
from hf_pathology.recipes import pretrain_ibot
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.tiles.shard_manifest import Manifest
from hf_pathology.tiles.shards import ShardBlocks


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "shards.md"


def run(*words, cwd: Path | None = None) -> Finished:
    return run_command("shard", *words, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with two slides of 768 x 768 pixels at 0.5 mpp in `SLIDES`, and their cohort table."""
    folder = tmp_path_factory.mktemp("shard_command")
    for index, label in enumerate(("glandular", "solid")):
        write_aperio(folder / "SLIDES" / f"{label}.svs", draw_slide(index, label, 768)[0], 0.5)
    (folder / "cohort.csv").write_text("slide,case,label\nglandular.svs,p0,a\nsolid.svs,p1,\n")
    return folder


@pytest.fixture(scope="module")
def written(folder) -> list[Finished]:
    """The commands of the page, run in `folder`."""
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    return [run(*shlex.split(line)[2:], cwd=folder) for line in block.splitlines()]


def front_matter(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])


def test_the_commands_of_the_page_do_what_it_says(folder, written):
    assert [finished.returncode for finished in written] == [0, 0, 0], [finished.stderr for finished in written]
    assert re.search(r"\d+ tiles of 2 slides: about \d+ MB, .* 100% of the tiles as the scanner", written[0].stdout)
    for out, files in (("SHARDS", ["tiles-00000.parquet"]), ("TARS", ["tiles-00000.tar", "tiles-00000.tar.index"])):
        assert sorted(path.name for path in (folder / out / "data").iterdir()) == files
        left = {path.name for path in (folder / out).iterdir()}
        assert left == {"data", "README.md", "shards.json", "report.json"}
        assert json.loads((folder / out / "report.json").read_text())["complete"]
    manifest = Manifest.load(folder / "SHARDS")
    assert manifest.tiles == manifest.passed == ShardBlocks(folder / "TARS").tiles > 0


def test_the_python_of_the_page_runs(folder, written, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, {})
    tiles = Manifest.load(folder / "SHARDS").tiles
    assert "(256, 256)" in capsys.readouterr().out.splitlines()[0] and tiles


def test_dry_run_writes_no_shard(folder, tmp_path):
    finished = run(folder / "SLIDES", "--out", tmp_path / "o", "--mpp", 0.5, "--size", 128, "--dry-run")
    assert finished.returncode == 0 and "0% of the tiles as the scanner stored them" in finished.stdout
    assert not (tmp_path / "o").exists()


def test_a_grid_that_was_made_before_is_used(folder, written, tmp_path):
    tiles = folder / "SHARDS.tiles"
    stamps = {path: path.stat().st_mtime_ns for path in tiles.rglob("*.safetensors")}
    finished = run(
        folder / "SLIDES", "--out", tmp_path / "o", "--mpp", 0.5, "--size", 256, "--tiles", tiles, "--limit", 1
    )
    assert finished.returncode == 0 and "of 1 of 1 slides" in finished.stdout
    assert {path: path.stat().st_mtime_ns for path in tiles.rglob("*.safetensors")} == stamps


def test_the_card_says_what_is_in_the_dataset_and_what_is_not_known(folder, written):
    card = (folder / "TARS" / "README.md").read_text(encoding="utf-8")
    tiles = Manifest.load(folder / "TARS").tiles
    for fact in (
        f"slides: 2; cases: 2; tiles: {tiles};",
        "0.5 microns per pixel asked for, 0.5000 to 0.5000 delivered",
        "at least 0.5 of their area tissue",
        "labels: a; slides without one: 1",
        f"{tiles} tiles are the scanner's own JPEG",
        "pictures of patients' tissue",
        "consent: not recorded",
    ):
        assert fact in card, fact
    assert "labels: none" in (folder / "SHARDS" / "README.md").read_text(encoding="utf-8")
    files = front_matter(folder / "TARS" / "README.md")["configs"][0]["data_files"]
    assert files == [{"split": "train", "path": "data/*.tar"}]


@pytest.mark.parametrize(("out", "image"), [("SHARDS", "image"), ("TARS", "jpg")])
def test_datasets_loads_the_folder_by_its_card(folder, written, out, image):
    rows = list(load_dataset(str(folder / out), split="train", streaming=True))
    assert len(rows) == Manifest.load(folder / out).tiles
    facts = rows[0] if out == "SHARDS" else rows[0]["json"]
    source = ShardBlocks(folder / out)
    blocks = source.read(range(len(source)))
    names = [(slide, *xy) for slide, xy in zip(blocks.slides, blocks.xy.tolist())]
    tile = blocks.tiles[names.index((facts["slide"], facts["x"], facts["y"]))]
    assert (np.asarray(rows[0][image].convert("RGB")) == tile).all()


def test_a_damaged_slide_is_named_and_the_exit_code_says_so(tmp_path):
    path = tmp_path / "slides" / "damaged.svs"
    write_aperio(path, draw_slide(0, "solid", 768)[0], 0.5, tile=64)
    made = run(tmp_path / "slides", "--out", tmp_path / "o", "--mpp", 0.5, "--size", 64, "--dry-run")
    assert made.returncode == 0, made.stderr
    stamp = path.stat().st_mtime_ns
    spoil_tiles(path, *range(60, 84))
    os.utime(path, ns=(stamp, stamp))
    finished = run(tmp_path / "slides", "--out", tmp_path / "o", "--mpp", 0.5, "--size", 64)
    assert finished.returncode == 1
    assert re.search(r"problem: damaged\.svs: \d+ of \d+ tiles could not be read", finished.stderr)
    assert "- damaged: damaged.svs: " in (tmp_path / "o" / "README.md").read_text(encoding="utf-8")
    assert not json.loads((tmp_path / "o" / "report.json").read_text())["complete"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--format": "zip"}, "error: format is zip: it must be parquet or webdataset"),
        ({"--quality": 101}, "error: quality is 101"),
        ({"--shard-mb": 0}, "error: shard_bytes is 0"),
        ({"--mpp": -1}, "error: mpp is -1.0"),
    ],
)
def test_options_that_make_no_sense_end_in_one_line(folder, written, tmp_path, options, message):
    words = {"--out": tmp_path / "o", "--mpp": 0.5, "--size": 256, "--tiles": folder / "SHARDS.tiles", **options}
    finished = run(folder / "SLIDES", *(word for pair in words.items() for word in pair))
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert finished.stderr.strip().splitlines()[-1].startswith(message)
    assert not (tmp_path / "o").exists()


SMALL = """
mpp: 0.5
tile_size: 256
global_size: 32
local_size: 16
local_views: 2
hidden_size: 32
num_hidden_layers: 1
num_attention_heads: 2
patch_size: 8
out_dim: 64
head_hidden_dim: 32
head_bottleneck_dim: 16
steps: 3
batch_size: 4
learning_rate: 1.0e-3
warmup_steps: 1
log_every: 1
window: 1
cpu: true
"""


def test_pretraining_takes_shards_in_the_place_of_slides(folder, written, tmp_path):
    config, out = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(SMALL)
    words = ["--config", config, "--shards", folder / "TARS", "--out", out]
    trained = run_recipe_here(pretrain_ibot.main, *words)
    assert trained.returncode == 0, trained.stderr
    card = (out / "encoder" / "README.md").read_text(encoding="utf-8")
    tiles = Manifest.load(folder / "TARS").tiles
    assert f"slides: not recorded; tiles: {tiles};" in card and "- tiles are 256 pixels at 0.5" in card
    for options, message in (
        (["--mpp", "1.0"], "has tiles of 256 px at 0.5 mpp: say so by --tile_size and --mpp (they are 256 and 1.0)"),
        (["--limit", "1"], "error: limit is no option for shards"),
        (
            ["--slides", folder / "SLIDES"],
            "error: say where the tiles come from: one of --slides, --shards and --tiles",
        ),
    ):
        refused = run_recipe_here(pretrain_ibot.main, *words, "--out", tmp_path / "other", *options)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert message in refused.stderr.strip().splitlines()[-1]


def test_sizes_have_the_names_of_the_hub():
    sizes = [10, 1_000, 99_999, 10**6, 2 * 10**9]
    assert list(map(size_category, sizes)) == ["n<1K", "1K<n<10K", "10K<n<100K", "1M<n<10M", "n>1B"]
