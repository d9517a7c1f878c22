"""What every pretraining recipe feeds its method: views of tiles in batches, coloured on the accelerator."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from hf_pathology.recipes.region_data import RegionCohort, RegionData
from hf_pathology.recipes.slide_data import SlideData, TileData
from hf_pathology.tiles.loader import TileLoader
from hf_pathology.tiles.photometric import Photometric
from hf_pathology.tiles.views import ViewOptions
from hf_pathology.training.options import TrainingOptions


def view_loader(
    cohort: TileData | RegionCohort,
    to_views: Callable[[dict[str, Any]], dict[str, Any]],
    data: SlideData | RegionData,
    training: TrainingOptions,
    accelerator: Accelerator,
) -> TileLoader:
    """The endless batches of views of this rank's tiles (or regions) of the cohort."""
    return TileLoader(
        cohort.source,
        to_views,
        batch_size=training.batch_size,
        window=data.window,
        seed=training.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=data.workers,
    )


def views_to_inputs(views: ViewOptions, device: torch.device) -> Callable[[dict[str, Any]], dict[str, torch.Tensor]]:
    """A function from a batch of `MultiCrop`'s rows to `global_views`, `local_views` and `hidden`, those that there are.

    Views become (V, B, 3, H, W), normalised, with their colours changed; hidden patches (V, B, h, w).
    """
    colours = Photometric(views.mean, views.std).to(device)

    def to_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        inputs = {
            name: colours(batch[name].to(device, non_blocking=True), batch[name.replace("views", "colours")])
            for name in ("global_views", "local_views")
            if name in batch
        }
        if "hidden" in batch:
            inputs["hidden"] = batch["hidden"].to(device, non_blocking=True).transpose(0, 1)
        return inputs

    return to_inputs
