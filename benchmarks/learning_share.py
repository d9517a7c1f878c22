"""What have two views of a tile in common, for an encoder that has not learned anything yet? By augmentation.

    python benchmarks/learning_share.py DATA/raw DATA/controlled

Self-distillation starts from what the teacher, untrained, says of two views alike. Its score of a tile, less the mean over
tiles, is a deviation; printed is the cosine between the deviations of two views of the same tile (for all tiles at once),
of the first of two global views with the second, and with a local one. 1: all that the teacher says is of the tile; 0: all
of it is of the view. Rows are what `learning.py --change` can change.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from learning import COMMON, METHODS, SETTINGS, own_statistics
from torch.utils.data import default_collate
from transformers.utils import logging

from hf_pathology.modeling.configuration_dino import DinoConfig
from hf_pathology.modeling.modeling_dino import DinoForPreTraining
from hf_pathology.modeling.trunk import trunk_tokens
from hf_pathology.recipes.inputs import views_to_inputs
from hf_pathology.recipes.pretrain_dino import DinoOptions
from hf_pathology.recipes.trunk import TrunkOptions, make_method, new_trunk
from hf_pathology.tiles.folder import LabelledTiles, TileDataset, read_tile_folder
from hf_pathology.tiles.views import MultiCrop, ViewOptions


TILES = 640
BATCH = 64
CPU = Accelerator(cpu=True)
CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "no jitter": {"jitter": [0.0, 0.0, 0.0, 0.0]},
    "jitter as published": {"jitter": [0.4, 0.4, 0.2, 0.1]},
    "gray 0.2": {"gray": 0.2},
    "solarize 0.2": {"solarize": 0.2},
    "blur as published": {"blur": [1.0, 0.1, 0.5]},
    "hed 0.05": {"hed": 0.05},
    "vertical_flip": {"vertical_flip": True},
    "quarter_turns": {"quarter_turns": True},
    "native_crops": {
        "native_crops": True,
        "global_scale": [0.9, 1.1],
        "local_scale": [0.9, 1.1],
        "ratio": [0.95, 1.05],
    },
    "initializer_range 0.02": {"initializer_range": 0.02},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    logging.disable_progress_bar()
    columns = []
    for folder in asked.tiles:
        tiles = read_tile_folder(folder)
        common = {**COMMON, **METHODS["dino"]}
        quiet = {**common, **SETTINGS["colourless"]["dino"], **own_statistics(tiles)}
        column = {"*published*": shares(tiles, common, asked.seed)}
        column |= {name: shares(tiles, quiet | change, asked.seed) for name, change in CHANGES.items()}
        columns.append(column)
    print(f"| change | {' | '.join(folder.name for folder in asked.tiles)} |\n|{'---|' * (1 + len(columns))}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join('{:.2f} / {:.2f}'.format(*column[name]) for column in columns)} |")


def shares(tiles: LabelledTiles, options: dict[str, Any], seed: int) -> tuple[float, float]:
    """The cosine of the teacher's deviations between two global views, and between a global and a local one."""
    views, trunk, numbers = (of_kind(kind, options) for kind in (ViewOptions, TrunkOptions, DinoOptions))
    torch.manual_seed(seed)
    model = make_method(
        DinoForPreTraining,
        lambda config: DinoConfig(config, **asdict(numbers)),
        trunk,
        lambda: new_trunk(trunk, views.global_size),
        CPU,
    ).eval()
    make, to_inputs = MultiCrop(views, seed), views_to_inputs(views, CPU.device)
    seen = TileDataset(tiles.subset("train"))
    order = np.random.default_rng(seed).permutation(len(seen))[:TILES]
    scores = []  # of each batch: first global view, second, local one
    for batch in np.split(order, len(order) // BATCH):
        rows = [{"tile": seen[i]["tiles"], "slide": "tiles", "xy": np.array([i, 0]), "epoch": 0} for i in batch]
        inputs = to_inputs(default_collate([make(row) for row in rows]))
        three = (inputs["global_views"][0], inputs["global_views"][1], inputs["local_views"][0])
        with torch.no_grad():
            scores.append([said_of(model, view) for view in three])
    first, second, local = (deviations(torch.cat(each)) for each in zip(*scores))
    return cosine(first, second), cosine(first, local)


def of_kind(kind: type, options: dict[str, Any]) -> Any:
    return kind(**{name: value for name, value in options.items() if name in kind.__dataclass_fields__})


def said_of(model: DinoForPreTraining, views: torch.Tensor) -> torch.Tensor:
    """The teacher's scores, (B, K)."""
    return model.teacher_head.prototypes(model.teacher_head.embed(trunk_tokens(model.teacher, views)[0]))


def deviations(scores: torch.Tensor) -> torch.Tensor:
    return scores - scores.mean(dim=0)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
