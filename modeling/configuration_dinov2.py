"""Configuration of DINOv2 pretraining (Oquab et al. 2023, arXiv 2304.07193)."""

from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from .trunk import trunk_config


class Dinov2PreTrainingConfig(PretrainedConfig):
    """What the combined recipe is made of: DINO and iBOT with heads of their own, and a term that spreads the features.

    The defaults are the published ones of the ViT-L recipe without its size. (The trunk's own configuration is
    transformers' `Dinov2Config`, `Dinov2WithRegistersConfig` or `ViTConfig`.)

    Args:
        encoder_config: the trunk, a configuration of transformers that can hide patches, or a dict of its fields (a ViT's by
            default).
        out_dim, patch_out_dim: numbers of prototypes of the class token and of the patches.
        head_hidden_dim, head_bottleneck_dim, head_layers, head_norm, unit_norm: of both heads, see `ProjectionHead`.
        drop_path_rate: stochastic depth, see `add_drop_path`.
        drop_path_subset: compute each branch only for the samples that do not drop out (`BatchSubset`), as published.
        centering: how the teacher's scores become targets: "sinkhorn", balanced over the batch of all ranks, or "softmax"
            with a running centre, as DINO and iBOT have it.
        sinkhorn_iterations: of Sinkhorn-Knopp.
        spreading: "koleo" (Sablayrolles et al. 2019, arXiv 1806.03198), "kde" (Virchow2, arXiv 2408.00738), or None.
        spreading_weight: of that term, summed over the global views; published are 0.1 for koleo and 0.05 for kde.
        kde_concentration: of the von Mises-Fisher kernels of "kde".
        student_temperature: divides the student's scores.
        teacher_temperature: divides the teacher's scores after the warm-up.
        warmup_teacher_temperature: where the warm-up starts.
        teacher_temperature_warmup_steps: optimizer steps of the linear warm-up.
        center_momentum, patch_center_momentum: of the running centres of "softmax".
        teacher_momentum: of the teacher's weights at the first step; rises to 1 along a cosine.
        cls_loss_weight, patch_loss_weight: of the terms of DINO and iBOT.
        freeze_last_layer_steps: optimizer steps during which the prototypes do not move.
    """

    model_type = "dinov2_pretraining"
    sub_configs = {"encoder_config": AutoConfig}

    def __init__(
        self,
        encoder_config: PretrainedConfig | dict[str, Any] | None = None,
        out_dim: int = 65536,
        patch_out_dim: int = 65536,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        head_layers: int = 3,
        head_norm: str | None = None,
        unit_norm: bool = False,
        drop_path_rate: float = 0.3,
        drop_path_subset: bool = True,
        centering: Literal["sinkhorn", "softmax"] = "sinkhorn",
        sinkhorn_iterations: int = 3,
        spreading: Literal["koleo", "kde"] | None = "koleo",
        spreading_weight: float = 0.1,
        kde_concentration: float = 5.0,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        teacher_temperature_warmup_steps: int = 0,
        center_momentum: float = 0.9,
        patch_center_momentum: float = 0.9,
        teacher_momentum: float = 0.992,
        cls_loss_weight: float = 1.0,
        patch_loss_weight: float = 1.0,
        freeze_last_layer_steps: int = 0,
        **kwargs,
    ):
        if centering not in ("sinkhorn", "softmax"):
            raise ValueError(f"centering is {centering!r}: it is 'sinkhorn' or 'softmax'")
        if spreading not in ("koleo", "kde", None):
            raise ValueError(f"spreading is {spreading!r}: it is 'koleo', 'kde' or None")
        self.encoder_config = trunk_config(encoder_config)
        self.out_dim = out_dim
        self.patch_out_dim = patch_out_dim
        self.head_hidden_dim = head_hidden_dim
        self.head_bottleneck_dim = head_bottleneck_dim
        self.head_layers = head_layers
        self.head_norm = head_norm
        self.unit_norm = unit_norm
        self.drop_path_rate = drop_path_rate
        self.drop_path_subset = drop_path_subset
        self.centering = centering
        self.sinkhorn_iterations = sinkhorn_iterations
        self.spreading = spreading
        self.spreading_weight = spreading_weight
        self.kde_concentration = kde_concentration
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.warmup_teacher_temperature = warmup_teacher_temperature
        self.teacher_temperature_warmup_steps = teacher_temperature_warmup_steps
        self.center_momentum = center_momentum
        self.patch_center_momentum = patch_center_momentum
        self.teacher_momentum = teacher_momentum
        self.cls_loss_weight = cls_loss_weight
        self.patch_loss_weight = patch_loss_weight
        self.freeze_last_layer_steps = freeze_last_layer_steps
        super().__init__(**kwargs)
