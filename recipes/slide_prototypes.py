"""The clusters of SLPD, made anew every so many steps by all processes together, and the same on any number of them."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator, DistributedType

from hf_pathology.errors import UserError, require_at_least
from hf_pathology.features.region_blocks import RegionBlocks
from hf_pathology.features.region_clusters import RegionClusters, cluster_slides, match_slides
from hf_pathology.modeling.modeling_slpd import SlpdForPreTraining
from hf_pathology.modeling.trunk import trunk_tokens


BATCH = 128  # regions that go through the teacher together, on any number of processes: bits depend on it


@dataclass
class ClusterOptions:
    """When and how the regions of each slide are clustered.

    Attributes:
        num_clusters: of a slide.
        min_regions: slides with fewer regions have no clusters, and their regions only DINO's loss.
        num_neighbours: most similar slides of each slide.
        first_clusters: optimizer steps before the first clustering; published are 21 epochs.
        cluster_every: optimizer steps between two; an epoch when None.
    """

    num_clusters: int = 4
    min_regions: int = 32
    num_neighbours: int = 1
    first_clusters: int = 0
    cluster_every: int | None = None

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("num_clusters", "min_regions", "num_neighbours")}
        require_at_least(1, **counts, cluster_every=self.cluster_every)
        require_at_least(0, first_clusters=self.first_clusters)
        if self.num_clusters > self.min_regions:
            raise UserError(
                f"num_clusters is {self.num_clusters} and min_regions {self.min_regions}: a slide that is clustered must "
                "have a region for each cluster"
            )

    def check_regions(self, regions: RegionBlocks) -> None:
        """Raises UserError when too few slides have enough regions."""
        enough = int((np.bincount(regions.slide_of) >= self.min_regions).sum())
        if enough <= self.num_neighbours:
            raise UserError(
                f"{enough} of {len(regions.slides)} slides have min_regions, {self.min_regions}, or more: too few for "
                f"{self.num_neighbours} neighbours of each; lower --min_regions, or use more slides"
            )

    def is_due(self, step: int, epoch: int) -> bool:
        """Whether it is time to cluster before this step; `epoch` steps are one."""
        return step >= self.first_clusters and (step - self.first_clusters) % (self.cluster_every or epoch) == 0


class SlidePrototypes:
    """Clusters the regions before a step, when it is time, and hands the clusters to the method.

    Args:
        crop: tiles along an edge of the middle of a region, which stands for it.
        epoch: optimizer steps of one.

    Raises UserError where weights are sharded: each process embeds regions of its own with the whole teacher.
    """

    def __init__(
        self,
        method: SlpdForPreTraining,
        regions: RegionBlocks,
        options: ClusterOptions,
        *,
        crop: int,
        epoch: int,
        seed: int,
        accelerator: Accelerator,
    ):
        if accelerator.distributed_type == DistributedType.FSDP:
            raise UserError(
                "SLPD clusters with the whole teacher on every process, and FSDP shards it: launch with "
                "recipes/accelerate/ddp.yaml, the second level fits any GPU"
            )
        self.method, self.regions, self.options = method, regions, options
        self.crop, self.epoch, self.seed, self.accelerator = crop, epoch, seed, accelerator

    def __call__(self, step: int) -> None:
        if not self.options.is_due(step, self.epoch):
            return
        found = self.clusters()
        arrays = (self.regions.slide_of, found.cluster_of, found.prototypes, found.neighbours, found.matched)
        self.method.set_clusters(*(torch.from_numpy(array) for array in arrays))

    def clusters(self) -> RegionClusters:
        """The clusters of all regions, the same on every process."""
        options, world = self.options, (self.accelerator.process_index, self.accelerator.num_processes)
        own = cluster_slides(
            self.embeddings(),
            self.regions.slide_of,
            clusters=options.num_clusters,
            min_regions=options.min_regions,
            seed=self.seed,
            share=world,
        )
        cluster_of, prototypes = (self._sum(array) for array in own)  # each slide is clustered by one process
        usable = np.bincount(self.regions.slide_of, minlength=len(prototypes)) >= options.min_regions
        cluster_of = np.where(usable[self.regions.slide_of], cluster_of, -1)
        return match_slides(cluster_of, prototypes, usable, options.num_neighbours)

    @torch.no_grad()
    def embeddings(self) -> np.ndarray:
        """What the teacher's head makes of the middle of each region, unit vectors float32 (regions, bottleneck)."""
        device = self.accelerator.device
        found = np.zeros((len(self.regions), self.method.config.head_bottleneck_dim), np.float32)
        first = (self.regions.kind.grid - self.crop) // 2
        middle = slice(first, first + self.crop)
        starts = range(0, len(self.regions), BATCH)
        for start in starts[self.accelerator.process_index :: self.accelerator.num_processes]:
            numbers = range(start, min(start + BATCH, len(self.regions)))
            grids = np.stack([self.regions[number][middle, middle] for number in numbers]).astype(np.float32)
            inputs = torch.from_numpy(grids).to(device).permute(0, 3, 1, 2)
            with self.accelerator.autocast():
                features, _ = trunk_tokens(self.method.teacher, inputs)
                embedded = self.method.teacher_head.embed(features)
            found[start : start + len(grids)] = embedded.float().cpu().numpy()
        return self._sum(found)  # each region is embedded by one process

    def _sum(self, array: np.ndarray) -> np.ndarray:
        """The sum over all processes."""
        return self.accelerator.reduce(torch.from_numpy(array).to(self.accelerator.device), "sum").cpu().numpy()
