"""Does a second level add anything? Both levels are trained on slides as a user does it, and the slides' neighbours judge each.

    python benchmarks/hierarchy_slides.py TILES DATA
    python benchmarks/hierarchy_learning.py DATA/tissue RUNS/tissue
    python benchmarks/hierarchy_learning.py DATA/arrangement RUNS/arrangement
    python benchmarks/hierarchy_learning.py DRAWN RUNS/drawn --min-tissue 0.5 --mpp 0.5 --stained
    python benchmarks/hierarchy_learning.py --report RUNS/*/result.json

The folder holds slides and their `cohort.csv`; DRAWN is that of `hf-pathology demo` without its slide of mere glass. A ViT of width 96 and depth 4 is trained on tiles of 32 pixels by DINO; a
second of width 96 and depth 3 on regions of 16 x 16 of their features, by DINO and by SLPD; no label is used. A slide is the
mean of its tiles or regions, its class what its five nearest neighbours are, or what logistic regression makes of it, over ten
folds by case. RUN/result.json gets the probabilities for each way to describe a slide; beside the trained levels stand untrained
ones and mean colours.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_pathology.evaluation.intervals import auc_difference, auc_interval
from hf_pathology.evaluation.splits import stratified_case_folds
from hf_pathology.features.bags import LabelledBags, read_labelled_bags
from hf_pathology.features.colour import MeanColour
from hf_pathology.features.embed import embed_cohort
from hf_pathology.recipes.knn_slides import knn_slides
from hf_pathology.slides.cohort import find_slides
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.tiling import grid_path


ROOT = Path(__file__).resolve().parents[1]
TILE, GRID = 32, 16  # pixels of a tile, tiles along an edge of a region
TILES: dict[str, Any] = {
    "tile_size": TILE,
    "workers": 0,
    "global_size": 32,
    "local_size": 16,
    "local_views": 4,
    "global_scale": [0.4, 1.0],
    "local_scale": [0.15, 0.4],
    "jitter": [0.1, 0.1, 0.1, 0.02],
    "gray": 0.0,
    "blur": [0.0, 0.0, 0.0],
    "solarize": 0.0,
    "vertical_flip": True,
    "quarter_turns": True,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "patch_size": 8,
    "initializer_range": 0.06,
    "batch_size": 128,
    "learning_rate": 1.0e-3,
    "reference_batch": 256,
    "warmup_steps": 100,
}
REGIONS: dict[str, Any] = {
    "workers": 0,
    "global_size": 14,
    "local_size": 6,
    "local_views": 4,
    "vertical_flip": True,
    "quarter_turns": True,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "batch_size": 32,
    "learning_rate": 2.0e-3,
    "reference_batch": 256,
    "warmup_steps": 50,
}
DISTILLATION: dict[str, Any] = {
    "out_dim": 1024,
    "drop_path_rate": 0.0,
    "teacher_temperature": 0.04,
    "warmup_teacher_temperature": 0.04,
    "teacher_momentum": 0.99,
    "freeze_last_layer_steps": 0,
    "log_every": 20,
    "panel_every": 100,
    "checkpoint_every": 1000,
    "cpu": True,
}
PROTOTYPES = {"num_clusters": 2, "num_neighbours": 1}
STAINED = {"jitter": [0.24, 0.24, 0.12, 0.1], "gray": 0.7}  # as `recipes/configs/ibot_demo.yaml` has them
STILL = {"steps": 1, "learning_rate": 0.0, "min_learning_rate": 0.0, "warmup_steps": 0}
SETS = {  # how a slide is described: the folder of features below the run
    "mean colour": "colour",
    "tiles, untrained": "tiles_untrained",
    "tiles": "tiles_trained",
    "regions, second level untrained": "regions_untrained/region_level",
    "regions, DINO (HIPT)": "regions_hipt/region_level",
    "regions, SLPD": "regions_slpd/region_level",
}
REFERENCE = "tiles, untrained"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", type=Path, nargs="?")
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500, help="of the first level")
    parser.add_argument("--region-steps", type=int, default=600, help="of the second")
    parser.add_argument("--mpp", type=float, default=1.0, help="that the tiles are read at")
    parser.add_argument("--min-tissue", type=float, default=0.0, help="share of a tile, and of a region")
    parser.add_argument("--min-regions", type=int, default=4, help="of a slide that SLPD clusters")
    parser.add_argument("--stained", action="store_true", help="slides differ in stain: most views are grey")
    parser.add_argument("--folds", type=int, default=10, help="of the neighbours")
    parser.add_argument("--judge-only", action="store_true", help="of a run that has all its features")
    parser.add_argument("--report", type=Path, nargs="+", help="results to print as a table")
    asked = parser.parse_args(argv)
    if asked.report:
        print("\n".join([*table_of(asked.report), "", *variance_table(asked.report)]))
        return
    if asked.run is None:
        parser.error("pass the slides and the folder of the run, or --report")
    spent = {} if asked.judge_only else train_both_levels(asked)
    result = {"slides": asked.slides.name, "seed": asked.seed, "seconds": spent}
    result |= judge(asked.run, asked.slides / "cohort.csv", asked.folds)
    (asked.run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    print("\n".join(table_of([asked.run / "result.json"])))


# Training and embedding, by the commands that a user has.


def train_both_levels(asked: argparse.Namespace) -> dict[str, float]:
    """Fills the folder of the run, going on where an earlier call ended; returns the seconds of each part done now."""
    run, spent = asked.run, {}
    seeded = {**DISTILLATION, "seed": asked.seed}
    tiles = {**seeded, **TILES, "slides": str(asked.slides), "steps": asked.steps}
    tiles |= {"mpp": asked.mpp, "min_tissue": asked.min_tissue, **(STAINED if asked.stained else {})}
    regions = {**seeded, **REGIONS, "features": str(run / "tiles_trained"), "steps": asked.region_steps}
    regions["tile_encoder"] = str(run / "dino" / "encoder")
    epoch = asked.region_steps // 10
    prototypes = {**PROTOTYPES, "min_regions": asked.min_regions, "first_clusters": 3 * epoch, "cluster_every": epoch}
    at = ["--mpp", str(asked.mpp), "--regions", str(TILE * GRID), "--min-tissue", str(asked.min_tissue)]
    parts = [
        ("dino", lambda: pretrain("dino", run / "dino", tiles)),
        ("dino_untrained", lambda: pretrain("dino", run / "dino_untrained", {**tiles, **STILL})),
        ("tiles_trained", lambda: embed(asked.slides, run / "dino" / "encoder", run / "tiles_trained", at)),
        ("tiles_untrained", lambda: embed(asked.slides, run / "dino_untrained/encoder", run / "tiles_untrained", at)),
        ("hipt", lambda: pretrain("hipt4k", run / "hipt", regions)),
        ("hipt_untrained", lambda: pretrain("hipt4k", run / "hipt_untrained", {**regions, **STILL})),
        ("slpd", lambda: pretrain("slpd", run / "slpd", {**regions, **prototypes})),
        ("regions_untrained", lambda: second_level(run, "hipt_untrained", "regions_untrained")),
        ("regions_hipt", lambda: second_level(run, "hipt", "regions_hipt")),
        ("regions_slpd", lambda: second_level(run, "slpd", "regions_slpd")),
        ("colour", lambda: embed_colour(asked.slides, run / "tiles_trained" / "tiles", run / "colour")),
    ]
    for name, part in parts:
        began = time.monotonic()
        part()
        spent[name] = round(time.monotonic() - began, 1)
        print(f"{name}: {spent[name]} s", flush=True)
    return spent


def pretrain(method: str, out: Path, options: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config = out / "options.yaml"
    config.write_text(yaml.safe_dump({**options, "out": str(out)}), encoding="utf-8")
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--mixed_precision", "bf16"]
    launch += ["--config_file", str(ROOT / "recipes/accelerate/cpu.yaml")]
    call([*launch, str(ROOT / f"recipes/pretrain_{method}.py"), "--config", str(config)], out)


def embed(slides: Path, encoder: Path, out: Path, options: Iterable[str]) -> None:
    call(["-m", "hf_pathology", "embed", str(slides), "--encoder", str(encoder), "--out", str(out), *options], out)


def second_level(run: Path, hierarchy: str, out: str) -> None:
    words = ["regions", str(run / "tiles_trained"), "--encoder", str(run / hierarchy / "encoder")]
    call(["-m", "hf_pathology", *words, "--out", str(run / out)], run / out)


def call(words: Sequence[str], out: Path) -> None:
    """Runs a program on one thread; what it says goes to OUT.said.txt."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f"{out.name}.said.txt").open("a") as said:
        subprocess.run([sys.executable, *words], env=one_thread, check=True, stdout=said, stderr=said)


def embed_colour(slides: Path, grids: Path, out: Path) -> None:
    pairs = [(slide, TileGrid.load(grid_path(grids, slide.key))) for slide in find_slides(slides)]
    for _, result in embed_cohort(pairs, MeanColour(), out):
        if isinstance(result, Exception):
            raise result


# Judging.


def judge(run: Path, cohort: Path, folds: int) -> dict[str, Any]:
    """What both judges say of each slide, for each way to describe the slides."""
    sets: dict[str, Any] = {}
    for name, folder in SETS.items():
        data = read_labelled_bags(run / folder, cohort)
        classes = sorted(set(data.labels))
        said = {"neighbours": knn_slides(data, folds=folds).votes, "regression": regression(data, folds)}
        sets[name] = {judge: probabilities.round(4).tolist() for judge, probabilities in said.items()}
        if name != "mean colour":
            sets[name]["variance"] = variance_shares(data)
    return {"sets": sets, "cases": list(map(str, data.cases)), "labels": list(data.labels), "classes": classes}


def regression(data: LabelledBags, folds: int) -> np.ndarray:
    """The probabilities (slides, classes) of logistic regression on the slides of other folds, its strength chosen on them."""
    means = np.stack([bag.features[bag.valid].mean(axis=0, dtype=np.float64) for bag in data.bags])
    classes = sorted(set(data.labels))
    targets = np.array([classes.index(label) for label in data.labels])
    probabilities = np.zeros((len(means), len(classes)))
    for known, asked in stratified_case_folds(data.cases, data.labels, folds, 0):
        strengths = {"C": np.logspace(-4, 4, 8)}
        folds_within = min(3, int(np.bincount(targets[known]).min()))
        chosen = GridSearchCV(LogisticRegression(max_iter=2000), strengths, scoring="accuracy", cv=folds_within)
        model = make_pipeline(StandardScaler(), chosen)
        probabilities[asked] = model.fit(means[known], targets[known]).predict_proba(means[asked])
    return probabilities


def variance_shares(data: LabelledBags) -> dict[str, float]:
    """Which share of the variance of regions (of tiles: of their means over a region) lies between slides, and between classes."""
    regions = []
    for bag in data.bags:
        features = np.where(bag.valid[:, None], bag.features, np.nan).astype(np.float64)
        regions.append(np.nanmean(features.reshape(-1, bag.region**2, features.shape[1]), axis=1))
    slide_of = np.repeat(np.arange(len(regions)), [len(each) for each in regions])
    class_of = np.array(data.labels)[slide_of]
    centred = np.concatenate(regions)
    centred -= centred.mean(axis=0)
    return {
        "between slides": between(centred, slide_of),
        "between classes": between(centred, class_of),
    }


def between(centred: np.ndarray, group_of: np.ndarray) -> float:
    """The variance of the groups' means as a share of that of all rows."""
    means = [
        (group_of == group).sum() * (centred[group_of == group].mean(axis=0) ** 2).sum() for group in set(group_of)
    ]
    return round(float(sum(means) / (centred**2).sum()), 4)


def table_of(results: Iterable[Path]) -> Iterable[str]:
    """Rows of a table in Markdown."""
    yield f"| run | a slide is the mean of | judged by | AUC | difference to *{REFERENCE}* |"
    yield "|---|---|---|---|---|"
    for path in results:
        result = json.loads(path.read_text(encoding="utf-8"))
        targets = [result["classes"].index(label) for label in result["labels"]]
        for judge in ("neighbours", "regression"):
            reference = np.array(result["sets"][REFERENCE][judge])
            for name, said in result["sets"].items():
                pair = (result["cases"], targets, np.array(said[judge]))
                more = "" if name == REFERENCE else f"{auc_difference(*pair, reference, seed=0)}"
                area = auc_interval(*pair, seed=0)
                yield f"| {name_of(path)} | {name} | {judge} | {area} | {more} |"


def name_of(result: Path) -> str:
    """What the run is called: by its folder, or by its file where it has been copied from there."""
    return result.parent.name if result.name == "result.json" else result.stem


def variance_table(results: Iterable[Path]) -> Iterable[str]:
    """Rows of a second table in Markdown."""
    yield "| run | features | variance between slides | between classes |\n|---|---|---|---|"
    for path in results:
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, said in result["sets"].items():
            if "variance" in said:
                shares = " | ".join(f"{share:.3f}" for share in said["variance"].values())
                yield f"| {name_of(path)} | {name} | {shares} |"


if __name__ == "__main__":
    main()
