"""Does it learn? A small ViT is trained by a recipe on real tiles, for a budget of CPU time, and judged beside itself untrained.

    python benchmarks/learning_data.py TILES DATA --whiten --grey
    python benchmarks/learning.py DATA/raw RUNS/dino-raw-0 --method dino --seed 0
    python benchmarks/learning.py DATA/controlled RUNS/dino-hed-0 --setting colourless --minutes 10 --change hed=0.05
    python benchmarks/learning_report.py RUNS/*/result.json

DATA/... is a folder of tiles with a manifest of class, group and split: trained is on the tiles of split train, without
their labels, judged on those of split val, by the nearest neighbours among the train tiles (k 20, temperature 0.07) and by
logistic regression on them. The network is a ViT of width 192 and depth 6 with patches of 16 pixels; views are 2 of 96 and
4 of 48 pixels, steps of 64 tiles, precision is bf16, all on one thread. The number of steps is what fits into --minutes of
CPU time, at the rate of a first few steps. RUN/result.json gets everything that the report needs.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from transformers import AutoModel
from transformers.utils import logging

from hf_pathology.evaluation.knn import weighted_knn
from hf_pathology.evaluation.tile_probe import embed_tiles, logistic_predictions, resized_tiles
from hf_pathology.modeling.trunk import trunk_tokens
from hf_pathology.tiles.folder import LabelledTiles, TileDataset, read_tile_folder
from hf_pathology.training.config import read_yaml
from hf_pathology.training.log import read_log


ROOT = Path(__file__).resolve().parents[1]
VIEW = 96  # pixels, of a global view and of a tile that is judged
BATCH = 64
PROBE = 60  # steps that tell the rate, of which the first third does not count
POINTS = 6  # of a curve
JUDGED_BY = {  # of the class token or the mean of the patches; the curve is of the first
    "dino": ("cls kNN", "cls logistic"),
    "ibot": ("cls kNN", "cls logistic"),
    "mae": ("mean logistic", "mean kNN", "cls logistic", "cls kNN"),
}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

COMMON = {
    "mpp": None,
    "tile_size": 224,
    "min_tissue": 0.0,
    "workers": 0,
    "in_memory": True,
    "splits": ["train"],
    "global_size": VIEW,
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "patch_size": 16,
    "batch_size": BATCH,
    "log_every": 20,
    "panel_every": 100,
    "checkpoint_every": 1000,
    "cpu": True,
    **IMAGENET,
}
MULTI_CROP = {"local_size": 48, "local_views": 4}
SELF_DISTILLATION = {
    "out_dim": 2048,
    "drop_path_rate": 0.1,
    "teacher_momentum": 0.99,
    "learning_rate": 5.0e-4,  # for 256 tiles: 1.25e-4 for 64
    "warmup_steps": 200,
}
METHODS: dict[str, dict[str, Any]] = {
    "dino": {**MULTI_CROP, "global_scale": [0.4, 1.0], "local_scale": [0.05, 0.4], **SELF_DISTILLATION},
    "ibot": {
        **MULTI_CROP,
        "global_scale": [0.32, 1.0],
        "local_scale": [0.05, 0.32],
        **SELF_DISTILLATION,
        "teacher_temperature": 0.04,
        "teacher_patch_temperature": 0.04,
    },
    "mae": {
        "global_views": 1,
        "local_views": 0,
        "global_scale": [0.2, 1.0],
        "jitter": [0.0, 0.0, 0.0, 0.0],
        "gray": 0.0,
        "blur": [0.0, 0.0, 0.0],
        "solarize": 0.0,
        "decoder_hidden_size": 128,
        "decoder_num_hidden_layers": 4,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 512,
        "learning_rate": 2.0e-3,
        "min_learning_rate": 0.0,
        "warmup_steps": 500,
        "warmup_includes_end": False,
        "weight_decay": 0.05,
        "final_weight_decay": 0.05,
        "beta2": 0.95,
        "clip_gradient": 0.0,
    },
}
QUIET_TEACHER = {"teacher_temperature": 0.02, "warmup_teacher_temperature": 0.02}
QUIET_VIEWS = {"jitter": [0.1, 0.1, 0.1, 0.02], "gray": 0.0, "blur": [0.0, 0.0, 0.0], "solarize": 0.0}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {  # what differs from METHODS
    "published": {method: {} for method in METHODS},
    "colourless": {  # for tiles whose colours say little; normalised by their own statistics
        "dino": {"initializer_range": 0.06, **QUIET_TEACHER, **QUIET_VIEWS},
        "ibot": {
            "initializer_range": 0.06,
            **QUIET_TEACHER,
            "teacher_patch_temperature": 0.02,
            "warmup_teacher_patch_temperature": 0.02,
            **QUIET_VIEWS,
        },
        "mae": {},
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--method", choices=METHODS, default="dino")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=40.0, help="CPU time of the training")
    parser.add_argument("--setting", choices=SETTINGS, default="published")
    parser.add_argument("--unrelated", action="store_true", help="the control: each view is of another tile")
    parser.add_argument(
        "--change", nargs="+", default=[], metavar="OPTION=VALUE", help="of the recipe, VALUE as in YAML"
    )
    asked = parser.parse_args(argv)
    changes = {name: yaml.safe_load(value) for name, _, value in (each.partition("=") for each in asked.change)}
    logging.disable_progress_bar()
    tiles = read_tile_folder(asked.tiles)
    statistics = {} if asked.setting == "published" else own_statistics(tiles)
    options = {
        **COMMON,
        **METHODS[asked.method],
        "tiles": str(asked.tiles),
        "seed": asked.seed,
        **SETTINGS[asked.setting][asked.method],
        **statistics,
        **changes,
    }
    asked.run.mkdir(parents=True, exist_ok=True)
    steps = planned_steps(asked.run, asked.method, options, 60 * asked.minutes)
    recipe = [str(ROOT / "benchmarks/unrelated_recipe.py"), asked.method] if asked.unrelated else None
    train(asked.run / "trained", asked.method, {**options, "steps": steps, "export_every": steps // POINTS}, recipe)
    still = {"steps": 1, "learning_rate": 0.0, "min_learning_rate": 0.0, "warmup_steps": 0}
    train(asked.run / "untrained", asked.method, {**options, **still})
    result = {"tiles": asked.tiles.name, "method": asked.method, "seed": asked.seed, "minutes": asked.minutes}
    changes |= {"views": "unrelated"} if asked.unrelated else {}
    result |= {"setting": asked.setting, "changes": changes}
    result |= judge_run(asked.run, asked.method, tiles, options)
    (asked.run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    print(json.dumps(result["curve"][-1]))


# Training, as a user does it.


def train(out: Path, method: str, options: dict[str, Any], recipe: list[str] | None = None) -> None:
    """Runs the recipe of the method, or the words of another one, or goes on with the run."""
    out.mkdir(parents=True, exist_ok=True)
    config = out / "options.yaml"
    config.write_text(yaml.safe_dump({**options, "out": str(out)}), encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--mixed_precision", "bf16"]
    launch += ["--config_file", str(ROOT / "recipes/accelerate/cpu.yaml")]
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    recipe = recipe or [str(ROOT / f"recipes/pretrain_{method}.py")]
    command = [*launch, *recipe, "--config", str(config)]
    with (out / "said.txt").open("a") as said:
        subprocess.run(command, env={**os.environ, **one_thread}, check=True, stdout=said, stderr=said)


def planned_steps(run: Path, method: str, options: dict[str, Any], seconds: float) -> int:
    """How many steps fit into so many seconds of CPU time; found once, so that a run that is interrupted goes on."""
    planned = run / "steps.yaml"
    if not planned.exists():
        probe = {**options, "steps": PROBE, "log_every": PROBE // 3 - 1, "warmup_steps": 0}
        train(run / "probe", method, probe)
        records = {record["step"]: record["cpu_seconds"] for record in read_log(run / "probe" / "log.jsonl")}
        first, last = PROBE // 3 - 1, 3 * (PROBE // 3 - 1)
        each = (records[last] - records[first]) / (last - first)
        steps = max(1, int(seconds / each) // POINTS) * POINTS
        planned.write_text(yaml.safe_dump({"steps": steps}), encoding="utf-8")
    return read_yaml(planned)["steps"]


def own_statistics(tiles: LabelledTiles) -> dict[str, list[float]]:
    """The mean of the train tiles and their standard deviation, a mean over tiles, of each channel, between 0 and 1."""
    known = TileDataset(tiles.subset("train"))
    each = [cv2.meanStdDev(known[i]["tiles"]) for i in range(len(known))]  # (3, 1) twice
    mean, std = np.mean(each, axis=0)[..., 0] / 255
    return {"mean": mean.round(4).tolist(), "std": std.round(4).tolist()}


# Judging.


def judge_run(run: Path, method: str, tiles: LabelledTiles, options: dict[str, Any]) -> dict[str, Any]:
    """The curve, the panels, and which val tiles the trained and the untrained encoder know."""
    known, asked = tiles.subset("train"), tiles.subset("val")
    pixels = [resized_tiles(TileDataset(part), VIEW) for part in (known, asked)]
    log = list(read_log(run / "trained" / "log.jsonl"))
    spent = np.array([[record["images"], record["cpu_seconds"]] for record in log])
    exports = {int(path.name.removeprefix("step_")): path for path in (run / "trained" / "encoders").iterdir()}
    curve, correct = [], {}
    for step, path in [(0, run / "untrained" / "encoder"), *sorted(exports.items())]:
        ways = JUDGED_BY[method] if step in (0, max(exports)) else JUDGED_BY[method][:1]
        right = judge_encoder(path, pixels, known.groups, ways, options)
        images = step * BATCH
        point = {"step": step, "images": images, "cpu_seconds": float(np.interp(images, *spent.T)) if step else 0.0}
        curve.append(point | {name: float(each.mean()) for name, each in right.items()})
        correct["trained" if step else "untrained"] = {
            name: "".join(map(str, each.astype(int))) for name, each in right.items()
        }
    names = {name: number for number, name in enumerate(dict.fromkeys(asked.groups))}
    return {
        "curve": curve,
        "panels": list(panels(log)),
        "correct": correct,
        "groups": [names[group] for group in asked.groups],
    }


def judge_encoder(
    path: Path,
    pixels: list[tuple[torch.Tensor, np.ndarray]],
    known_groups: Iterable[str],
    ways: Iterable[str],
    options: dict[str, Any],
) -> dict[str, np.ndarray]:
    """Of each way to judge, whether each val tile is classified rightly."""
    encoder = AutoModel.from_pretrained(path).eval()
    (known, known_labels), (asked, asked_labels) = pixels
    statistics = {name: options[name] for name in IMAGENET}
    features = [embed_tiles(encoder, part, both_tokens, **statistics) for part in (known, asked)]
    width = features[0].shape[1] // 2
    right = {}
    for way in ways:
        token, judge = way.split()
        train, test = (part[:, :width] if token == "cls" else part[:, width:] for part in features)
        if judge == "kNN":
            predicted = weighted_knn(train, known_labels, test).argmax(dim=1).numpy()
        else:
            predicted = logistic_predictions(train.numpy(), known_labels, np.asarray(known_groups), test.numpy())
        right[way] = predicted == asked_labels
    return right


def both_tokens(encoder: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The class token and the mean of the patches, (B, 2 D)."""
    images, patches = trunk_tokens(encoder, pixels)
    return torch.cat([images, patches.mean(dim=1)], dim=1)


def panels(log: Iterable[dict[str, Any]]) -> Iterable[dict[str, float]]:
    """The numbers of the collapse panel, with the loss."""
    left_out = {"seconds", "waited_seconds", "finite", "alarm", "images_per_second"}
    for record in log:
        if "feature_std" in record:
            yield {
                name: round(value, 6) if isinstance(value, float) else value
                for name, value in record.items()
                if name not in left_out
            }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
