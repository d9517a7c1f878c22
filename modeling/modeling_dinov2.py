"""The combined recipe: DINO and iBOT with separate heads, and spread features (Oquab et al. 2023, arXiv 2304.07193)."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .configuration_dinov2 import Dinov2PreTrainingConfig
from .self_distillation import RunningCenter, hidden_patch_loss, teacher_probabilities, view_loss
from .sinkhorn import sinkhorn
from .spreading import kde, koleo
from .teacher_student import TeacherStudent
from .trunk import trunk_tokens


@dataclass
class Dinov2Output(ModelOutput):
    """`loss` to go downhill on, and the detached scalars that made it."""

    loss: torch.Tensor | None = None
    cls_loss: torch.Tensor | None = None
    patch_loss: torch.Tensor | None = None
    spreading_loss: torch.Tensor | None = None


class Dinov2ForPreTraining(TeacherStudent):
    """DINO on the class token, iBOT on the hidden patches, each with its head, and class tokens pushed apart.

    Sinkhorn's balance and the spreading are over a micro-batch (Sinkhorn's and KDE's over that of all ranks), so two
    micro-batches are not the same as one of twice the size.
    """

    config_class = Dinov2PreTrainingConfig
    base_model_prefix = "dinov2_pretraining"
    hides_patches = True

    def __init__(self, config: Dinov2PreTrainingConfig):
        super().__init__(config)
        self.student_head, self.teacher_head = self._make_heads(config.out_dim)
        self.student_patch_head, self.teacher_patch_head = self._make_heads(config.patch_out_dim)
        if config.centering == "softmax":
            self.center = RunningCenter((1, config.out_dim), config.center_momentum)
            self.patch_center = RunningCenter((1, config.patch_out_dim), config.patch_center_momentum)
        self.post_init()
        self.start_teacher()

    def forward(
        self,
        global_views: torch.Tensor,
        hidden: torch.Tensor,
        local_views: torch.Tensor | None = None,
    ) -> Dinov2Output:
        """The loss of one micro-batch.

        Args:
            global_views: normalised pixels (V, B, 3, H, W).
            hidden: bool (V, B, h, w), True for the patches that the student does not see.
            local_views: normalised pixels (L, B, 3, H', W'), or None.
        """
        config, (views, batch) = self.config, global_views.shape[:2]
        hidden = hidden.flatten(0, 1).flatten(1)  # (V * B, patches)
        where = hidden.flatten().nonzero().squeeze(1)  # (M,), the hidden patches among all
        with torch.no_grad():
            features, targets, patch_targets = self._teach(global_views.flatten(0, 1), where)
            targets = targets.unflatten(0, (views, batch))
        images, patches = self.see(global_views, local_views, hidden)
        embeddings = self.student_head.embed(images)
        patch_embeddings = self.student_patch_head.embed(patches.flatten(0, 1)[where])
        with torch.autocast(images.device.type, enabled=False):
            scores = self.student_head.prototypes(embeddings.float()).unflatten(0, (-1, batch))  # (V + L, B, K)
            patch_scores = self.student_patch_head.prototypes(patch_embeddings.float())  # (M, patch K)
            cls_loss = view_loss(scores, targets, config.student_temperature)
            patch_loss = hidden_patch_loss(patch_scores, patch_targets, hidden, config.student_temperature)
            spreading_loss = self._spread(images[: views * batch].float().unflatten(0, (views, batch)))
            loss = (
                config.cls_loss_weight * cls_loss
                + config.patch_loss_weight * patch_loss
                + config.spreading_weight * spreading_loss
            )
        self.remember(features.unflatten(0, (views, batch)), targets, cls_loss)
        return Dinov2Output(
            loss=loss,
            cls_loss=cls_loss.detach(),
            patch_loss=patch_loss.detach(),
            spreading_loss=spreading_loss.detach(),
        )

    def _teach(self, pixels: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The teacher's features of images (V * B, D), its targets for them (V * B, K) and for the hidden patches (M, patch K)."""
        features, patches = trunk_tokens(self.teacher, pixels)
        embeddings = self.teacher_head.embed(features)
        patch_embeddings = self.teacher_patch_head.embed(patches.flatten(0, 1)[where])
        with torch.autocast(pixels.device.type, enabled=False):
            scores = self.teacher_head.prototypes(embeddings.float())
            patch_scores = self.teacher_patch_head.prototypes(patch_embeddings.float())
            if self.config.centering == "sinkhorn":
                iterations = self.config.sinkhorn_iterations
                targets, patch_targets = (
                    sinkhorn(each, self.teacher_temperature, iterations) for each in (scores, patch_scores)
                )
            else:
                targets = teacher_probabilities(scores, self.center.value, self.teacher_temperature)
                patch_targets = teacher_probabilities(patch_scores, self.patch_center.value, self.teacher_temperature)
                self.center.add(scores.sum(dim=0), len(scores))
                self.patch_center.add(patch_scores.sum(dim=0), len(patch_scores))
                # Only of hidden patches, as published; there, though, each rank weighs alike, however many it has.
        return features, targets, patch_targets

    def _spread(self, features: torch.Tensor) -> torch.Tensor:
        """How close to each other the class tokens (V, B, D) of different tiles are, summed over the views."""
        if self.config.spreading == "koleo":
            return sum(koleo(view) for view in features)
        if self.config.spreading == "kde":
            return sum(kde(view, self.config.kde_concentration) for view in features)
        return features.new_zeros(())
