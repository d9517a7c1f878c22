"""Slides judged by their neighbours from the command line, by tiles and by regions."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hierarchies import release_hierarchy
from programs import run_command, run_recipe_here

from hf_pathology.recipes import knn_slides
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.synthetic import draw_slide


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    """Twelve small slides of two kinds, and the three levels of their features."""
    folder = tmp_path_factory.mktemp("knn")
    rows = ["slide,case,label"]
    for number in range(12):
        label = ("glandular", "solid")[number % 2]
        write_aperio(folder / "slides" / f"{number}.svs", draw_slide(number, label, 512)[0], 0.5)
        rows.append(f"{number}.svs,{number // 2 * 2 + number % 2},{label}")
    (folder / "cohort.csv").write_text("\n".join(rows) + "\n")
    hierarchy = release_hierarchy(folder / "hierarchy")
    assert run_command("embed", folder / "slides", "--encoder", hierarchy, "--out", folder / "out").returncode == 0
    return folder


@pytest.mark.parametrize(("level", "pooling"), [("tile_level", "cls"), ("region_level", "region")])
def test_both_levels_are_judged_and_the_votes_written(embedded, tmp_path, level, pooling):
    words = ["--features", embedded / "out" / level, "--cohort", embedded / "cohort.csv", "--out", tmp_path]
    done = run_recipe_here(knn_slides.main, *words, "--folds", 3, "--k", 3)
    assert done.returncode == 0, done.stderr
    found, votes = json.loads((tmp_path / "knn.json").read_text()), pd.read_csv(tmp_path / "knn.csv")
    assert found["features"]["pooling"] == pooling and len(found["auc"]["folds"]) == 3
    assert found["auc"]["mean"] == pytest.approx(np.mean(found["auc"]["folds"]))
    assert len(votes) == 12 and np.allclose(votes[["votes_glandular", "votes_solid"]].sum(axis=1), 1)


def test_more_folds_than_cases_are_refused_in_one_line(embedded, tmp_path):
    words = ["--features", embedded / "out" / "region_level", "--cohort", embedded / "cohort.csv", "--out", tmp_path]
    done = run_recipe_here(knn_slides.main, *words)
    assert done.returncode == 1 and "10 folds need 10" in done.stderr
