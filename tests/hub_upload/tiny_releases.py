"""Releases of every kind as users make them, by the commands and recipes themselves, of a few thousand weights."""

from pathlib import Path

import numpy as np
from PIL import Image
from programs import Finished, run_command, run_recipe_here

from hf_pathology.recipes import finetune_lora, pretrain_hipt4k, pretrain_ibot
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.synthetic import draw_slide


TILE, REGION = 32, 4  # pixels along a tile, tiles along a region
LICENCE = ["--licence", "cc-by-nc-4.0"]
PRETRAINING = {
    "mpp": 1.0,
    "tile_size": TILE,
    "global_size": TILE,
    "local_size": 16,
    "local_views": 2,
    "min_tissue": 0.0,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "out_dim": 64,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "steps": 4,
    "batch_size": 8,
    "log_every": 1,
    "checkpoint_every": 2,
    "window": 8,
    "workers": 0,
    "judge_every": 2,
    "judge_k": 2,
    "export_every": 2,
}
REGIONS = {
    "global_size": 3,
    "local_size": 2,
    "local_views": 2,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "out_dim": 64,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "steps": 2,
    "batch_size": 4,
    "log_every": 1,
    "checkpoint_every": 2,
    "window": 4,
    "workers": 0,
}


def words(options: dict) -> list[str]:
    return ["--cpu", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def whole(finished: Finished) -> None:
    assert finished.returncode == 0, finished.stderr


def draw_cohort(folder: Path, slides: int = 8) -> None:
    """Writes `slides/`, and `labels.csv` with a case for each slide."""
    rows = ["slide,case,label"]
    for number in range(slides):
        label = ("glandular", "solid")[number % 2]
        write_aperio(folder / "slides" / f"{label}{number}.svs", draw_slide(number, label, 512)[0], 0.5)
        rows.append(f"{label}{number}.svs,case{number},{label}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def draw_tiles(folder: Path, tiles: int = 12) -> None:
    """Writes noise of two grains, with a manifest that puts every three tiles of a class into a group."""
    generator, rows = np.random.default_rng(0), ["path,class,group"]
    for name, grain in (("coarse", 8), ("fine", 2)):
        (folder / name).mkdir(parents=True)
        for tile in range(tiles):
            cells = generator.integers(0, 256, (TILE // grain, TILE // grain, 3), dtype=np.uint8)
            Image.fromarray(cells.repeat(grain, axis=0).repeat(grain, axis=1)).save(folder / name / f"{tile}.png")
            rows.append(f"{name}/{tile}.png,{name},{name}{tile // 3}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def pretrain(folder: Path) -> None:
    """Makes `run/encoder` of `slides/`, judged by `labelled/`."""
    where = ["--slides", folder / "slides", "--out", folder / "run", "--judge", folder / "labelled"]
    measured = ["--energy_kwh", 0.5, "--carbon_intensity", 56]
    whole(run_recipe_here(pretrain_ibot.main, *words(PRETRAINING), *where, *LICENCE, *measured))


def embed(folder: Path) -> None:
    """Makes `features/` of `slides/` by `run/encoder`."""
    where = ["--encoder", folder / "run" / "encoder", "--out", folder / "features"]
    whole(run_command("embed", folder / "slides", *where, "--regions", TILE * REGION, "--min-tissue", 0, *LICENCE))


def pretrain_regions(folder: Path) -> None:
    """Makes `hierarchy/encoder` of `features/`, and `region_run/encoder`, the second level alone."""
    where = ["--features", folder / "features", *words(REGIONS), *LICENCE]
    whole(run_recipe_here(pretrain_hipt4k.main, *where, "--out", folder / "hierarchy"))
    alone = ["--tile_encoder", "none", "--out", folder / "region_run"]
    whole(run_recipe_here(pretrain_hipt4k.main, *where, *alone))


def train_heads(folder: Path) -> None:
    """Makes `abmil/head`, and `hipt/head`, which starts with the second level of `hierarchy/encoder`."""
    where = [
        "--features",
        folder / "features",
        "--cohort",
        folder / "labels.csv",
        "--folds",
        2,
        "--epochs",
        2,
        *LICENCE,
    ]
    whole(run_command("train-mil", *where, "--out", folder / "abmil"))
    start = ["--head", "hipt", "--region-encoder", folder / "hierarchy" / "encoder"]
    whole(run_command("train-mil", *where, *start, "--out", folder / "hipt"))


def adapt(folder: Path) -> None:
    """Makes `lora/` of `run/encoder` and `labelled/`."""
    where = ["--encoder", folder / "run" / "encoder", "--tiles", folder / "labelled", "--out", folder / "lora"]
    numbers = {"rank": 2, "epochs": 2, "batch_size": 8, "workers": 0, "val_fraction": 0.5}
    whole(run_recipe_here(finetune_lora.main, *words(numbers), *where, *LICENCE))


def shard(folder: Path) -> None:
    """Makes `shards/` of `slides/`."""
    whole(run_command("shard", folder / "slides", "--out", folder / "shards", "--mpp", 1.0, "--size", 64, *LICENCE))


RELEASES = {  # the folder of each kind
    "encoder": "run/encoder",
    "hierarchy": "hierarchy/encoder",
    "region encoder": "region_run/encoder",
    "abmil": "abmil/head",
    "hipt head": "hipt/head",
    "adapter": "lora/adapter",
    "merged": "lora/merged",
    "classifier": "lora/classifier",
    "features": "features",
    "tiles": "shards",
}


def make_all(folder: Path) -> Path:
    """The folder with a release of every kind."""
    draw_cohort(folder)
    draw_tiles(folder / "labelled")
    for make in (pretrain, embed, pretrain_regions, train_heads, adapt, shard):
        make(folder)
    return folder
