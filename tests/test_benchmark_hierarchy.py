"""The experiment with both levels: its slides show what their labels say and nothing else, and its report adds up."""

import json
import sys

import hierarchy_learning
import hierarchy_slides
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_pathology.slides.reader import Slide
from hf_pathology.tiles.folder import read_tile_folder


CLASSES = ("lung_aca", "lung_n", "lung_scc")
SHADE = {"lung_aca": 60, "lung_n": 200, "lung_scc": 120}  # grey values, by which the class of a pixel is known


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Two tiles each of twelve pictures of each class; the green of a picture is its own."""
    folder = tmp_path_factory.mktemp("tiles")
    rows = ["path,class,group"]
    for name in CLASSES:
        (folder / name).mkdir()
        for number in range(24):
            pixels = np.full((224, 224, 3), SHADE[name], np.uint8)
            pixels[..., 1] = 10 * (number // 2)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
            rows.append(f"{name}/{number}.png,{name},{name}_{number // 2}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_no_picture_is_in_two_slides_and_each_shows_its_class(tiles):
    seen = set()
    for label, picture in hierarchy_slides.tissue_slides(read_tile_folder(tiles), np.random.default_rng(0)):
        assert (picture[..., 0] == SHADE[label]).all()
        pictures = {(label, green) for green in np.unique(picture[..., 1]).tolist()}
        assert len(pictures) == 3 and not pictures & seen
        seen |= pictures
    assert len(seen) == 36


def test_slides_differ_only_in_how_the_same_shares_are_arranged(tiles):
    neighbours = {"gathered": [], "scattered": []}
    for label, picture in hierarchy_slides.arranged_slides(read_tile_folder(tiles), np.random.default_rng(0)):
        kinds = picture[::64, ::64, 0] == SHADE["lung_n"]
        for part in (picture[16::64, 5::64, 0], picture[63::64, 63::64, 0]):
            assert ((part == SHADE["lung_n"]) == kinds).all()  # squares of 64 pixels, on the grid of the tiles
        assert kinds.mean() == 0.5
        assert len(np.unique(picture[..., 1][picture[..., 0] == SHADE["lung_n"]])) == 2
        neighbours[label].append((kinds[1:] == kinds[:-1]).mean())
    assert len(neighbours["gathered"]) == len(neighbours["scattered"]) == 3
    assert min(neighbours["gathered"]) > 0.7 and max(neighbours["scattered"]) < 0.6


def result(path, right: dict[str, int]):
    """Results of 40 slides, of which each way to describe them gets so many right."""
    targets = np.arange(40) % 2
    sets = {}
    for name, count in right.items():
        wrong = np.arange(40) >= count
        votes = np.eye(2)[np.where(wrong, 1 - targets, targets)]
        sets[name] = {"neighbours": votes.tolist(), "regression": (1 - votes).tolist()}
    cases = [f"case{number}" for number in range(40)]
    labels = [("a", "b")[target] for target in targets]
    content = {"slides": "tissue", "seed": 0, "cases": cases, "labels": labels, "classes": ["a", "b"], "sets": sets}
    path.write_text(json.dumps(content))
    return path


def test_the_report_compares_every_way_with_untrained_tiles(tmp_path):
    rows = list(
        hierarchy_learning.table_of([result(tmp_path / "tissue-0.json", {"tiles, untrained": 30, "tiles": 40})])
    )
    assert len(rows) == 6
    assert rows[2].startswith("| tissue-0 | tiles, untrained | neighbours | 0.750 [") and rows[2].endswith("|  |")
    assert "| tiles | neighbours | 1.000 [1.000, 1.000] | 0.250 [" in rows[3]
    assert "| tiles | regression | 0.000 [0.000, 0.000] | -0.250 [" in rows[5]


def test_variance_is_shared_between_slides_and_classes():
    class_of, slide_of = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    rng = np.random.default_rng(0)
    noise = rng.normal(size=8)
    for values, groups, share in ((class_of, class_of, 1.0), (slide_of, slide_of, 1.0), (noise, np.arange(8), 1.0)):
        centred = (values - values.mean())[:, None].astype(float)
        assert hierarchy_learning.between(centred, groups) == pytest.approx(share, abs=1e-4)
    centred = (slide_of - slide_of.mean())[:, None].astype(float)  # 0, 1, 2, 3: classes explain 1 of 1.25
    assert hierarchy_learning.between(centred, class_of) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.slow
def test_both_levels_are_trained_and_judged(tiles, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hierarchy_slides, "EDGE", 1024)
    monkeypatch.setattr(sys, "argv", ["hierarchy_slides.py", str(tiles), str(tmp_path / "data")])
    hierarchy_slides.main()
    slides = tmp_path / "data" / "tissue"
    assert pd.read_csv(slides / "cohort.csv").label.value_counts().to_dict() == dict.fromkeys(CLASSES, 4)
    with Slide(slides / "000.svs") as slide:
        assert slide.dimensions == (1024, 1024)
    capsys.readouterr()
    steps = ["--steps", "4", "--region-steps", "20", "--folds", "2"]
    hierarchy_learning.main([str(slides), str(tmp_path / "run"), *steps])
    assert len(capsys.readouterr().out.splitlines()) == 11 + 2 + 2 * len(hierarchy_learning.SETS)
    sets = json.loads((tmp_path / "run" / "result.json").read_text())["sets"]
    for said in (one[judge] for one in sets.values() for judge in ("neighbours", "regression")):
        np.testing.assert_allclose(np.sum(said, axis=1), 1, atol=1e-3)
