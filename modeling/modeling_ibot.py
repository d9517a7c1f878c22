"""iBOT: self-distillation between views and of hidden patches (Zhou et al. 2022, arXiv 2111.07832)."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .configuration_ibot import IbotConfig
from .self_distillation import RunningCenter, hidden_patch_loss, teacher_probabilities, view_loss
from .teacher_student import TeacherStudent
from .trunk import trunk_tokens


@dataclass
class IbotOutput(ModelOutput):
    """`loss` to go downhill on, and the detached scalars that made it."""

    loss: torch.Tensor | None = None
    cls_loss: torch.Tensor | None = None
    patch_loss: torch.Tensor | None = None


class IbotForPreTraining(TeacherStudent):
    """DINO's prediction between views, and of what the teacher says of the patches that are hidden from the student.

    The student sees the global views with patches hidden, and the local views; the teacher sees the global views whole.
    """

    config_class = IbotConfig
    base_model_prefix = "ibot"
    hides_patches = True
    temperatures = ("teacher_temperature", "teacher_patch_temperature")

    def __init__(self, config: IbotConfig):
        super().__init__(config)
        self.student_head, self.teacher_head = self._make_heads(config.out_dim, config.patch_out_dim)
        self.center = RunningCenter((1, config.out_dim), config.center_momentum)
        self.patch_center = RunningCenter((1, 1, config.patch_out_dim or config.out_dim), config.patch_center_momentum)
        self.post_init()
        self.start_teacher()

    def forward(
        self,
        global_views: torch.Tensor,
        hidden: torch.Tensor,
        local_views: torch.Tensor | None = None,
    ) -> IbotOutput:
        """The loss of one micro-batch.

        Args:
            global_views: normalised pixels (V, B, 3, H, W).
            hidden: bool (V, B, h, w), True for the patches that the student does not see.
            local_views: normalised pixels (L, B, 3, H', W'), or None.
        """
        views, batch = global_views.shape[:2]
        hidden = hidden.flatten(0, 1).flatten(1)  # (V * B, patches)
        where = hidden.flatten().nonzero().squeeze(1)  # (M,), the hidden patches among all
        with torch.no_grad():
            features, targets, patch_targets = self._teach(global_views.flatten(0, 1), where)
            targets = targets.unflatten(0, (views, batch))
        images, patches = self.see(global_views, local_views, hidden)
        embeddings = self.student_head.embed(torch.cat([images, patches.flatten(0, 1)[where]]))
        with torch.autocast(embeddings.device.type, enabled=False):
            temperature = self.config.student_temperature
            scores = self.student_head.prototypes(embeddings[: len(images)].float()).unflatten(0, (-1, batch))
            patch_scores = self.student_head.patch_prototypes(embeddings[len(images) :].float())
            cls_loss = view_loss(scores, targets, temperature)
            patch_loss = hidden_patch_loss(patch_scores, patch_targets, hidden, temperature)
            loss = self.config.cls_loss_weight * cls_loss + self.config.patch_loss_weight * patch_loss
        self.remember(features.unflatten(0, (views, batch)), targets, cls_loss)
        return IbotOutput(loss=loss, cls_loss=cls_loss.detach(), patch_loss=patch_loss.detach())

    def _teach(self, pixels: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The teacher's features of images (V * B, D), its probabilities of them (V * B, K) and of the hidden patches (M, K)."""
        features, patches = trunk_tokens(self.teacher, pixels)
        embeddings = self.teacher_head.embed(torch.cat([features[:, None], patches], dim=1))
        with torch.autocast(pixels.device.type, enabled=False):
            embeddings = embeddings.float()
            scores = self.teacher_head.prototypes(embeddings[:, 0])
            patch_scores = self.teacher_head.patch_prototypes(embeddings[:, 1:].flatten(0, 1)[where])
            targets = teacher_probabilities(scores, self.center.value, self.teacher_temperature)
            patch_targets = teacher_probabilities(
                patch_scores, self.patch_center.value[0], self.teacher_patch_temperature
            )
            self.center.add(scores.sum(dim=0), len(scores))
            # The centre is the mean score of all patches, hidden or not. Scores are linear in the embedding, so the
            # score of the mean embedding is that mean, without scoring every patch for every prototype.
            all_patches = embeddings[:, 1:].flatten(0, 1)
            mean_scores = self.teacher_head.patch_prototypes(all_patches.mean(dim=0))
            self.patch_center.add(mean_scores * len(all_patches), len(all_patches))
        return features, targets, patch_targets
