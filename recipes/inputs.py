"""What every pretraining recipe feeds its method: a batch of views on the accelerator, coloured there."""

from collections.abc import Callable
from typing import Any

import torch

from hf_pathology.tiles.photometric import Photometric
from hf_pathology.tiles.views import ViewOptions


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
