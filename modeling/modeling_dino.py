"""DINO: self-distillation between views of a tile (Caron et al. 2021, arXiv 2104.14294)."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .configuration_dino import DinoConfig
from .self_distillation import RunningCenter, teacher_probabilities, view_loss
from .teacher_student import TeacherStudent
from .trunk import trunk_tokens


@dataclass
class DinoOutput(ModelOutput):
    """`loss` to go downhill on."""

    loss: torch.Tensor | None = None


class DinoForPreTraining(TeacherStudent):
    """The student predicts, from each view of a tile, what the teacher says of the tile's other global views.

    The trunk may be any vision model of transformers; one without a class token is represented by its pooled map.
    """

    config_class = DinoConfig
    base_model_prefix = "dino"

    def __init__(self, config: DinoConfig):
        super().__init__(config)
        self.student_head, self.teacher_head = self._make_heads(config.out_dim)
        self.center = RunningCenter((1, config.out_dim), config.center_momentum)
        self.post_init()
        self.start_teacher()

    def forward(self, global_views: torch.Tensor, local_views: torch.Tensor | None = None) -> DinoOutput:
        """The loss of one micro-batch.

        Args:
            global_views: normalised pixels (V, B, 3, H, W).
            local_views: normalised pixels (L, B, 3, H', W'), or None.
        """
        _, loss = self.between_views(global_views, local_views)
        return DinoOutput(loss=loss)

    def between_views(
        self, global_views: torch.Tensor, local_views: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's scores (V + L, B, K), float32, and their loss; the arguments are those of `forward`."""
        views, batch = global_views.shape[:2]
        with torch.no_grad():
            features, _ = trunk_tokens(self.teacher, global_views.flatten(0, 1))  # (V * B, D)
            embeddings = self.teacher_head.embed(features)
            with torch.autocast(embeddings.device.type, enabled=False):
                scores = self.teacher_head.prototypes(embeddings.float())  # (V * B, K)
                targets = teacher_probabilities(scores, self.center.value, self.teacher_temperature)
                targets = targets.unflatten(0, (views, batch))
                self.center.add(scores.sum(dim=0), len(scores))
        embeddings = self.student_head.embed(self.see(global_views, local_views)[0])
        with torch.autocast(embeddings.device.type, enabled=False):
            scores = self.student_head.prototypes(embeddings.float()).unflatten(0, (-1, batch))  # (V + L, B, K)
            loss = view_loss(scores, targets, self.config.student_temperature)
        self.remember(features.unflatten(0, (views, batch)), targets, loss)
        return scores, loss
