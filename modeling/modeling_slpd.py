"""SLPD: DINO on regions, and towards the prototypes of slides (Yu et al. 2023, arXiv 2307.08259)."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .configuration_slpd import SlpdConfig
from .modeling_dino import DinoForPreTraining
from .self_distillation import RunningCenter, teacher_probabilities, view_loss


@dataclass
class SlpdOutput(ModelOutput):
    """`loss` to go downhill on, and the detached scalars that made it."""

    loss: torch.Tensor | None = None
    cls_loss: torch.Tensor | None = None
    own_loss: torch.Tensor | None = None
    neighbour_loss: torch.Tensor | None = None


class SlpdForPreTraining(DinoForPreTraining):
    """DINO's prediction between views, and of what the teacher's head says of the prototypes of slides.

    A region's targets are the prototype of its cluster, and the most similar prototype of each slide that is most similar
    to its own. Before the first clustering, and for regions of slides that are too small for one, there is DINO's loss only.
    Clusters are buffers: they are saved with the weights.
    """

    config_class = SlpdConfig
    base_model_prefix = "slpd"

    def __init__(self, config: SlpdConfig):
        super().__init__(config)
        self.own_center, self.neighbour_center = (
            RunningCenter((1, config.out_dim), config.center_momentum) for _ in range(2)
        )
        slides, clusters, neighbours = config.num_slides, config.num_clusters, config.num_neighbours
        self.register_buffer("slide_of", torch.zeros(config.num_regions, dtype=torch.int64))
        self.register_buffer("cluster_of", torch.full((config.num_regions,), -1))  # -1: in no cluster
        self.register_buffer("prototypes", torch.zeros(slides, clusters, config.head_bottleneck_dim))
        self.register_buffer("neighbours", torch.zeros(slides, neighbours, dtype=torch.int64))
        self.register_buffer("matched", torch.zeros(slides, clusters, neighbours, dtype=torch.int64))

    @torch.no_grad()
    def set_clusters(
        self,
        slide_of: torch.Tensor,
        cluster_of: torch.Tensor,
        prototypes: torch.Tensor,
        neighbours: torch.Tensor,
        matched: torch.Tensor,
    ) -> None:
        """From now on, these are the clusters.

        Args:
            slide_of: of each region, (regions,).
            cluster_of: of each region, (regions,), -1 for none.
            prototypes: unit vectors in the bottleneck of the head, (slides, clusters, bottleneck).
            neighbours: the slides most similar to each, (slides, neighbours).
            matched: for each prototype the most similar one of each of these, (slides, clusters, neighbours).
        """
        values = (slide_of, cluster_of, prototypes, neighbours, matched)
        buffers = (self.slide_of, self.cluster_of, self.prototypes, self.neighbours, self.matched)
        for buffer, value in zip(buffers, values):
            if buffer.shape != value.shape:
                raise ValueError(f"clusters of shape {tuple(value.shape)} for a model of {tuple(buffer.shape)}")
            buffer.copy_(value)

    def forward(
        self, global_views: torch.Tensor, regions: torch.Tensor, local_views: torch.Tensor | None = None
    ) -> SlpdOutput:
        """The loss of one micro-batch.

        Args:
            global_views: grids of tile features (V, B, D, h, w).
            regions: the number of each region in the cohort, int64 (B,).
            local_views: grids (L, B, D, h', w'), or None.
        """
        scores, cls_loss = self.between_views(global_views, local_views)
        with torch.autocast(scores.device.type, enabled=False):
            own_loss, neighbour_loss = self.prototype_losses(scores, regions)
            loss = cls_loss + self.config.own_weight * own_loss + self.config.neighbour_weight * neighbour_loss
        return SlpdOutput(
            loss=loss, cls_loss=cls_loss.detach(), own_loss=own_loss.detach(), neighbour_loss=neighbour_loss.detach()
        )

    def prototype_losses(self, scores: torch.Tensor, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The cross-entropies with a region's own prototype and with those of its slide's neighbours.

        Means over all views and over the regions that have a cluster, so those of micro-batches with different numbers of
        them do not add up to that of one batch; zero when there are none.

        Args:
            scores: of the student, (V, B, K).
            regions: int64 (B,).
        """
        clusters = self.cluster_of[regions]
        kept = clusters >= 0
        if not kept.any():
            nothing = 0.0 * scores.sum()
            return nothing, nothing
        scores, clusters, slides = scores[:, kept], clusters[kept], self.slide_of[regions[kept]]
        neighbours, matched = self.neighbours[slides], self.matched[slides, clusters]  # (B', r) each
        own = self.prototypes[slides, clusters][None]  # (1, B', bottleneck)
        others = self.prototypes[neighbours, matched].transpose(0, 1)  # (r, B', bottleneck)
        others_center = self.own_center if self.config.original_artefacts else self.neighbour_center
        return self._towards(own, scores, self.own_center), self._towards(others, scores, others_center)

    def _towards(self, prototypes: torch.Tensor, scores: torch.Tensor, center: RunningCenter) -> torch.Tensor:
        """The cross-entropy of all views (V, B, K) with what the teacher's head says of prototypes (n, B, bottleneck)."""
        with torch.no_grad():
            teacher = self.teacher_head.prototypes(prototypes)  # (n, B, K)
            targets = teacher_probabilities(teacher, center.value, self.teacher_temperature)
            center.add(teacher.sum(dim=(0, 1)), teacher[..., 0].numel())
            if self.config.original_artefacts:
                center.step()
        if self.config.original_artefacts:
            return view_loss(scores, targets, self.config.student_temperature)
        log_probabilities = (scores.float() / self.config.student_temperature).log_softmax(dim=-1)
        return -(log_probabilities.mean(dim=0) * targets.mean(dim=0)).sum(dim=-1).mean()
