"""The second paragraph of the recipes of the second level: the regions of a feature folder, and what could not be used."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from hf_pathology.errors import UserError, require_at_least
from hf_pathology.features.region_blocks import RegionBlocks
from hf_pathology.slides.cohort import read_table


@dataclass
class RegionData:
    """Which regions to train on.

    Attributes:
        features: folder that `hf-pathology embed --regions` wrote.
        out: folder of the run.
        cohort: CSV that names the slides to use in its column `slide`; all in the folder when None.
        splits: use only the slides of these splits of the cohort table; all when None.
        window: regions that are read and mixed together.
        workers: processes that read for each rank; part of what a resumed run must keep to go on bit by bit.
        limit: use only this many slides.
    """

    features: str
    out: str
    cohort: str | None = None
    splits: list[str] | None = None
    window: int = 256
    workers: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        require_at_least(1, window=self.window, limit=self.limit)
        require_at_least(0, workers=self.workers)
        if self.splits and not self.cohort:
            raise UserError("splits are chosen, but no table says them: pass it as --cohort")

    def deciding(self) -> dict[str, int]:
        """The options that decide the order of the regions."""
        return {"window": self.window}


@dataclass(frozen=True)
class RegionCohort:
    """The regions that can be trained on.

    Attributes:
        source: of the stream.
        problems: one message for every slide of which something was left out.
    """

    source: RegionBlocks
    problems: Sequence[str]

    def deciding(self) -> dict[str, Any]:
        """What decides which regions are seen."""
        kind = self.source.kind
        known = {"mpp": kind.mpp, "tile_size": kind.tile_size, "pooling": kind.pooling}
        return {**known, "region": kind.grid, "regions": self.source.fingerprint}


def load_regions(data: RegionData, accelerator: Accelerator) -> RegionCohort:
    """The regions that `data` names. Raises UserError when there are none."""
    slides = None
    if data.cohort:
        table = read_table(data.cohort, required=("slide",) if data.splits is None else ("slide", "split"))
        rows = table if data.splits is None else table[table["split"].isin(data.splits)]
        slides = rows["slide"].to_list()
    source = RegionBlocks(data.features, slides, limit=data.limit)
    if accelerator.is_main_process:
        for problem in source.problems:
            print(problem, file=sys.stderr)
    return RegionCohort(source, source.problems)


def crops_to_inputs(
    device: torch.device, regions: RegionBlocks | None = None
) -> Callable[[dict[str, Any]], dict[str, torch.Tensor]]:
    """A function from a batch of `GridCrops`' rows to `global_views` and `local_views`, (V, B, D, h, w), on the device.

    With `regions`, to the number of each region among them, too.
    """

    def to_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        inputs = {
            name: batch[name].to(device, non_blocking=True).transpose(0, 1)
            for name in ("global_views", "local_views")
            if name in batch
        }
        if regions is not None:
            inputs["regions"] = torch.from_numpy(regions.numbers(batch["slide"], batch["xy"].numpy())).to(device)
        return inputs

    return to_inputs
