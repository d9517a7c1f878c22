"""Does the demo's pretraining learn what tiles show? A control in which it cannot: views of unrelated tiles.

    hf-pathology demo --out demo
    python benchmarks/unrelated_views.py demo

Trains the demo's encoder twice on the demo's own tiles with the loss of the class token only: on two views of the same
tile, and on a view of one tile and a view of another, where nothing about the tissue can be learned but what all tiles
have in common. Then cross-validates the demo's slide classifier on the features of both, and prints a table. What the
control gains over the untrained encoder is owed to the colour changes of the views, not to the tissue.
"""

import sys
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_pathology.commands.embed import embed_slides
from hf_pathology.commands.launch import CONFIG
from hf_pathology.features.bags import read_labelled_bags
from hf_pathology.features.encoder import load_encoder
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.modeling.configuration_ibot import IbotConfig
from hf_pathology.modeling.modeling_ibot import IbotForPreTraining
from hf_pathology.recipes.pretrain_ibot import IbotOptions
from hf_pathology.recipes.slide_data import SlideData, load_tiles
from hf_pathology.recipes.train_mil import HeadTraining, cross_validate
from hf_pathology.recipes.trunk import TrunkOptions, make_method, new_trunk, patch_grid
from hf_pathology.record import RunRecord
from hf_pathology.slides.tiling import GridOptions
from hf_pathology.tiles.filters import FilterOptions
from hf_pathology.tiles.hidden import HiddenOptions, HiddenPatches
from hf_pathology.tiles.loader import TileLoader
from hf_pathology.tiles.photometric import Photometric
from hf_pathology.tiles.views import MultiCrop, ViewOptions
from hf_pathology.training.config import parse_config
from hf_pathology.training.log import read_log
from hf_pathology.training.loop import TrainingLoop
from hf_pathology.training.options import TrainingOptions


def main(demo: Path) -> None:
    config = str(files("hf_pathology.recipes") / "configs" / CONFIG)
    argv = ["--config", config, "--slides", str(demo / "slides"), "--out", str(demo / "control")]
    argv += ["--cohort", str(demo / "slides" / "cohort.csv"), "--grids", str(demo / "tiles")]
    kinds = (
        SlideData,
        GridOptions,
        FilterOptions,
        ViewOptions,
        HiddenOptions,
        TrunkOptions,
        IbotOptions,
        TrainingOptions,
    )
    data, grid, filters, views, patches, trunk, numbers, training = parse_config(*kinds, argv=argv)
    numbers = replace(numbers, patch_loss_weight=0.0)
    accelerator = Accelerator(cpu=True)
    cohort = load_tiles(data, grid, filters, accelerator)
    print("| views | AUC of unseen cases | teacher entropy | uniform entropy | feature std | view agreement |")
    print("|---|---|---|---|---|---|")
    for shift in (0, 1):
        out = demo / "control" / ("unrelated" if shift else "related")
        torch.manual_seed(training.seed)
        model = make_method(
            IbotForPreTraining,
            lambda config: IbotConfig(config, **asdict(numbers)),
            trunk,
            lambda: new_trunk(trunk, views.global_size),
            accelerator,
        )
        edge = patch_grid(model.config.encoder_config, views.global_size)
        loader = TileLoader(
            cohort.source,
            MultiCrop(views, training.seed, HiddenPatches(patches, edge, edge)),
            batch_size=training.batch_size,
            window=data.window,
        )
        colours = Photometric(views.mean, views.std)

        def to_inputs(batch: dict, shift: int = shift, colours: Photometric = colours) -> dict[str, torch.Tensor]:
            """The recipe's inputs, but that each view after the first is of the tile `shift` places further."""
            global_views = colours(batch["global_views"], batch["global_colours"])
            return {
                "global_views": torch.stack([view.roll(i * shift, 0) for i, view in enumerate(global_views)]),
                "hidden": batch["hidden"].transpose(0, 1),
                "local_views": colours(batch["local_views"], batch["local_colours"]).roll(2 * shift, 1),
            }

        loop = TrainingLoop(
            model, loader, to_inputs, training, accelerator, out, {"shift": shift, "steps": training.steps}
        )
        release = {"tile_size": views.global_size, "mpp": grid.mpp, "mean": views.mean, "std": views.std}
        encoder = load_encoder(export_encoder(loop.run().encoder, out / "encoder", **release))
        embed_slides(
            list(zip(cohort.slides, cohort.source.grids)), encoder, out / "features", RunRecord("control", {})
        )
        bags = read_labelled_bags(out / "features", data.cohort)
        found = cross_validate(bags.bags, bags.labels, bags.cases, training=HeadTraining(max_tiles=200))
        panel = [record for record in read_log(out / "log.jsonl") if "teacher_entropy" in record][-1]
        names = ("teacher_entropy", "uniform_entropy", "feature_std", "view_agreement")
        print(f"| {out.name} | {found.auc} | " + " | ".join(f"{panel[name]:.2f}" for name in names) + " |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
