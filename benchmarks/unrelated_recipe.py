"""A recipe whose views are each of another tile: the control of `learning.py --unrelated`.

    python benchmarks/unrelated_recipe.py dino --config options.yaml

Nothing about a tile can be learned from views of different ones but what all tiles have in common. What an encoder gains
here over the untrained one is owed to the views' colour changes and to training as such, not to the tissue.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from hf_pathology.training.start import run_recipe


def unrelated(to_inputs: Callable[[Any], dict[str, torch.Tensor]]) -> Callable[[Any], dict[str, torch.Tensor]]:
    """The inputs of `to_inputs`, but that view number i of all is that of the tile i places further in the batch."""

    def of_others(batch: Any) -> dict[str, torch.Tensor]:
        inputs, first = to_inputs(batch), 0
        for name in ("global_views", "local_views"):
            if name in inputs:
                views = [view.roll(first + i, dims=0) for i, view in enumerate(inputs[name])]
                inputs[name], first = torch.stack(views), first + len(views)
        return inputs

    return of_others


def main(method: str, argv: list[str]) -> None:
    recipe = import_module(f"hf_pathology.recipes.pretrain_{method}")
    related = recipe.views_to_inputs
    recipe.views_to_inputs = lambda views, device: unrelated(related(views, device))
    run_recipe(recipe.main, argv)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
