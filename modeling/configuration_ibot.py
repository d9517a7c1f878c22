"""Configuration of iBOT pretraining (Zhou et al. 2022, arXiv 2111.07832)."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .trunk import trunk_config


class IbotConfig(PretrainedConfig):
    """What iBOT is made of; the defaults are the published ViT-B/16 recipe with one head for class and patch tokens.

    Args:
        encoder_config: the trunk, a configuration of transformers that can hide patches (`vit`, `dinov2`, ...), or a dict of
            its fields (a ViT's by default).
        out_dim: number of prototypes of the class token (and of the patches when they share the head).
        patch_out_dim: number of prototypes of the patches when they have their own, None when the head is shared.
        head_hidden_dim, head_bottleneck_dim, head_layers, head_norm, unit_norm: see `ProjectionHead`.
        drop_path_rate: stochastic depth of the student's last layer, falling linearly to 0 in the first.
        student_temperature: divides the student's scores.
        teacher_temperature, teacher_patch_temperature: divide the teacher's scores after the warm-up.
        warmup_teacher_temperature, warmup_teacher_patch_temperature: where the warm-up starts.
        teacher_temperature_warmup_steps: optimizer steps of the linear warm-up of both.
        center_momentum, patch_center_momentum: of the running means that are subtracted from the teacher's scores.
        teacher_momentum: of the teacher's weights at the first step; rises to 1 along a cosine.
        cls_loss_weight, patch_loss_weight: of the two terms of the loss.
        freeze_last_layer_steps: optimizer steps during which the prototypes do not move.
    """

    model_type = "ibot"
    sub_configs = {"encoder_config": AutoConfig}

    def __init__(
        self,
        encoder_config: PretrainedConfig | dict[str, Any] | None = None,
        out_dim: int = 8192,
        patch_out_dim: int | None = None,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        head_layers: int = 3,
        head_norm: str | None = None,
        unit_norm: bool = True,
        drop_path_rate: float = 0.1,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        teacher_patch_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_patch_temperature: float = 0.04,
        teacher_temperature_warmup_steps: int = 0,
        center_momentum: float = 0.9,
        patch_center_momentum: float = 0.9,
        teacher_momentum: float = 0.996,
        cls_loss_weight: float = 1.0,
        patch_loss_weight: float = 1.0,
        freeze_last_layer_steps: int = 0,
        **kwargs,
    ):
        self.encoder_config = trunk_config(encoder_config)
        self.out_dim = out_dim
        self.patch_out_dim = patch_out_dim
        self.head_hidden_dim = head_hidden_dim
        self.head_bottleneck_dim = head_bottleneck_dim
        self.head_layers = head_layers
        self.head_norm = head_norm
        self.unit_norm = unit_norm
        self.drop_path_rate = drop_path_rate
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.teacher_patch_temperature = teacher_patch_temperature
        self.warmup_teacher_temperature = warmup_teacher_temperature
        self.warmup_teacher_patch_temperature = warmup_teacher_patch_temperature
        self.teacher_temperature_warmup_steps = teacher_temperature_warmup_steps
        self.center_momentum = center_momentum
        self.patch_center_momentum = patch_center_momentum
        self.teacher_momentum = teacher_momentum
        self.cls_loss_weight = cls_loss_weight
        self.patch_loss_weight = patch_loss_weight
        self.freeze_last_layer_steps = freeze_last_layer_steps
        super().__init__(**kwargs)
