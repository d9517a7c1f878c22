"""The command line as a user meets it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from programs import run_command
from transformers import ViTConfig, ViTModel

from hf_pathology.features.store import SlideFeatures
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.synthetic import draw_slide


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for index in range(6):
        write_aperio(folder / f"case_{index}.svs", draw_slide(index, ("glandular", "solid")[index % 2], 768)[0], 0.5)
    (folder / "labels.csv").write_text(
        "slide,case,label\n" + "".join(f"case_{i}.svs,p{i},{('x', 'y')[i % 2]}\n" for i in range(6))
    )
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    folder = tmp_path_factory.mktemp("release") / "encoder"
    return export_encoder(ViTModel(config, add_pooling_layer=False), folder, tile_size=32, mpp=1.0)


@pytest.fixture(scope="module")
def features(slides, encoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("features") / "bags"
    finished = run_command("embed", slides, "--encoder", encoder, "--out", out)
    assert finished.returncode == 0, finished.stderr
    assert "by " + str(encoder) in (out / "report.html").read_text()
    return out


def test_help_waits_for_no_heavy_library():
    code = """
import sys
from hf_pathology.cli import main
sys.argv = ["hf-pathology", "--help"]
try:
    main()
finally:
    print("loaded:", sorted({"cv2", "datasets", "numpy", "sklearn", "torch", "transformers"} & set(sys.modules)))
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train-mil" in finished.stdout and "loaded: []" in finished.stdout


def test_tile_writes_grids_masks_pictures_and_a_report_and_says_what_it_could_not_do(slides, tmp_path):
    folder = tmp_path / "slides"
    shutil.copytree(slides, folder)
    write_aperio(folder / "blank.svs", draw_slide(9, None, 768)[0], 0.5)
    write_aperio(folder / "mute.svs", draw_slide(8, "solid", 768)[0], None)
    (folder / "broken.svs").write_bytes(b"nothing")
    finished = run_command("tile", folder, "--out", tmp_path / "tiles", "--mpp", 1.0, "--size", 64)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    for part in ("blank.svs has no tile", "mute.svs does not declare its resolution", "broken.svs is no slide"):
        assert f"problem: {folder}/{part}" in finished.stderr
    record = json.loads((tmp_path / "tiles" / "report.json").read_text())
    assert not record["complete"] and len(record["problems"]) == 3 and len(record["slides"]) == 6
    page = (tmp_path / "tiles" / "report.html").read_text()
    assert "case_0.svs" in page and "blank.svs" in page
    assert len(list((tmp_path / "tiles").rglob("*.safetensors"))) == 6


def test_a_slide_without_resolution_is_tiled_when_the_user_says_it(tmp_path):
    write_aperio(tmp_path / "mute.svs", draw_slide(8, "solid", 768)[0], None)
    finished = run_command("tile", tmp_path, "--out", tmp_path / "t", "--mpp", 1.0, "--size", 64, "--slide-mpp", 0.5)
    assert finished.returncode == 0, finished.stderr


def test_embed_takes_a_tiling_folder_as_it_was_made(encoder, tmp_path):
    write_aperio(tmp_path / "slide.svs", draw_slide(8, "solid", 768)[0], 0.5)
    words = ["--out", tmp_path / "tiles", "--mpp", 1.0, "--size", 32, "--min-tissue", 0.1, "--tissue", "clam-biopsy"]
    assert run_command("tile", tmp_path / "slide.svs", *words).returncode == 0
    grid = TileGrid.load(tmp_path / "tiles" / "grids" / "slide.svs.safetensors")
    words = ["--encoder", encoder, "--out", tmp_path / "features", "--tiles", tmp_path / "tiles"]
    finished = run_command("embed", tmp_path / "slide.svs", *words)
    assert finished.returncode == 0, finished.stderr
    bag = SlideFeatures.load(tmp_path / "features" / "slide.svs.features.safetensors")
    assert np.array_equal(bag.xy, grid.xy) and (grid.tissue_fraction < 0.5).any()
    refused = run_command("embed", tmp_path / "slide.svs", *words, "--size", 64)
    assert refused.returncode == 1 and "holds tiles of 32 px at 1.0 mpp" in refused.stderr


def test_embed_estimates_embeds_and_finds_what_is_done(slides, encoder, features, tmp_path):
    estimated = run_command("embed", slides, "--encoder", encoder, "--out", tmp_path, "--dry-run", "--limit", 2)
    assert estimated.returncode == 0 and "tiles of 2 slides: about" in estimated.stdout
    assert not list(tmp_path.rglob("*.features.safetensors"))
    stamps = {path: path.stat().st_mtime_ns for path in features.rglob("case*.features.safetensors")}
    again = run_command("embed", slides, "--encoder", encoder, "--out", features)
    assert again.returncode == 0 and len(stamps) >= 6
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_embedding_at_another_resolution_is_refused(slides, encoder, tmp_path):
    refused = run_command("embed", slides, "--encoder", encoder, "--out", tmp_path, "--mpp", 0.5)
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("error:") and "was trained at 1.0 mpp" in refused.stderr


def test_a_head_is_trained_applied_and_painted(slides, features, tmp_path):
    table = slides / "labels.csv"
    trained = run_command(
        "train-mil", "--features", features, "--cohort", table, "--out", tmp_path / "mil", "--folds", 3
    )
    assert trained.returncode == 0, trained.stderr
    assert "prob" not in trained.stderr and (tmp_path / "mil" / "report.html").is_file()
    assert "ROC-AUC of unseen cases" in trained.stdout
    predictions = tmp_path / "predictions.csv"
    predicted = run_command(
        "predict", "--head", tmp_path / "mil" / "head", "--features", features, "--out", predictions
    )
    assert predicted.returncode == 0, predicted.stderr
    rows = pd.read_csv(predictions)
    assert len(rows) == 6 and rows[["prob_x", "prob_y"]].sum(axis=1).round(6).eq(1).all()
    head = tmp_path / "mil" / "head"
    painted = run_command(
        "heatmap", slides, "--head", head, "--features", features, "--out", tmp_path / "maps", "--limit", 2
    )
    assert painted.returncode == 0, painted.stderr
    assert sorted(path.name for path in (tmp_path / "maps").glob("*.jpg")) == ["case_0.svs.jpg", "case_1.svs.jpg"]


def test_a_label_with_one_case_is_refused(slides, features, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text((slides / "labels.csv").read_text().replace("case_5.svs,p5,y", "case_5.svs,p5,rare"))
    refused = run_command(
        "train-mil", "--features", features, "--cohort", table, "--out", tmp_path / "mil", "--folds", 3
    )
    assert refused.returncode == 1 and "rare" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "mil" / "head").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--mpp": 0}, "mpp is 0.0: it must be a positive number"),
        ({"--mpp": -1}, "mpp is -1.0: it must be a positive number"),
        ({"--size": 0}, "tile_size is 0: it must be at least 1"),
        ({"--stride": 0}, "stride is 0: it must be at least 1"),
        ({"--min-tissue": 2}, "min_tissue is 2.0: it is a share"),
        ({"--limit": 0}, "limit is 0: it must be at least 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_anything_is_done(slides, tmp_path, options, message):
    words = {"--out": tmp_path / "o", "--mpp": 1, "--size": 64, **options}
    finished = run_command("tile", slides, *(word for pair in words.items() for word in pair))
    assert finished.returncode == 1 and finished.stderr.strip() == f"error: {finished.stderr.strip()[7:]}"
    assert message in finished.stderr and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tile", "nowhere", "--out", "o", "--mpp", "1", "--size", "64"], "error: nowhere does not exist"),
        (["embed", "nowhere", "--encoder", "none", "--out", "o"], "error: none cannot be loaded as an encoder"),
        (["predict", "--head", "none", "--features", "none", "--out", "o"], "error: none holds no"),
        (["train-mil", "--features", "f", "--cohort", "c.csv", "--out", "o"], "error: c.csv does not exist"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path, words, message):
    finished = run_command(*words, cwd=tmp_path)
    assert finished.returncode == 1
    assert finished.stderr.strip().splitlines()[-1].startswith(message) and "Traceback" not in finished.stderr


def test_a_folder_without_slides_is_refused(tmp_path):
    finished = run_command("tile", tmp_path, "--out", tmp_path / "o", "--mpp", 1, "--size", 64)
    assert finished.returncode == 1 and "holds no slide" in finished.stderr


def test_doctor_passes_good_slides_and_names_bad_ones(slides, encoder, tmp_path):
    good = run_command("doctor", slides, "--encoder", encoder)
    assert good.returncode == 0, good.stdout
    assert "one tile gives 32 numbers" in good.stdout
    (tmp_path / "broken.svs").write_bytes(b"nothing")
    bad = run_command("doctor", tmp_path)
    assert bad.returncode == 1 and "broken.svs is no slide" in bad.stdout
