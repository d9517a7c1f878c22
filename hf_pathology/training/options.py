"""The options of a training run, and which of them decide its result."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ..errors import UserError, require_at_least


# How a run is watched and kept. These may change when it goes on; `batch_size` and `accumulation` too, since it is their
# product with the number of processes that decides, which the loop records as `tiles_a_step`.
FREE = {
    *("batch_size", "accumulation", "log_every", "panel_every", "checkpoint_every", "keep_checkpoints", "keep_every"),
    *("export_every", "judge_every", "trackers", "max_non_finite", "cpu"),
}


@dataclass
class TrainingOptions:
    """How long and how fast to train; the defaults of the rates are those of DINO and iBOT.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: tiles in a micro-batch of one process.
        accumulation: micro-batches of one optimizer step.
        learning_rate: for `reference_batch` tiles a step.
        batch_scaling: the rate used is `learning_rate` times `tiles_a_step / reference_batch`, or its square root, or 1.
        reference_batch: see above; 256 for DINO, iBOT and MAE, 1024 with the square root for DINOv2.
        min_learning_rate: where the cosine ends; not scaled.
        warmup_steps: steps of the linear warm-up of the learning rate.
        warmup_includes_end: the warm-up reaches its end at its last step (DINO), or at the step after it (MAE).
        weight_decay, final_weight_decay: where the cosine of the weight decay starts and ends.
        optimizer: `adamw`, `sgd` (with momentum) or `lars`.
        momentum: of `sgd` and `lars`.
        beta1, beta2: of `adamw`.
        layer_decay: the rate of a layer is this times the rate of the layer above it (DINOv2: 0.9).
        patch_embedding_rate: factor of the rate of the patch embedding (DINOv2: 0.2).
        clip_gradient: norm to which gradients are clipped, 0 for none.
        clip_scope: what is clipped by itself: each `parameter` (DINO, iBOT), the whole `model`, or each `module` that
            the method is made of (DINOv2).
        seed: of the weights, the order of the tiles and the views.
        init_from: a checkpoint, or the `out` of a run, whose weights a new run starts from.
        log_every, panel_every, checkpoint_every: steps between two records, two collapse panels, two checkpoints.
        keep_checkpoints: how many of the last checkpoints stay.
        keep_every: steps between two checkpoints that stay for good, 0 for none.
        export_every, judge_every: steps between two exports of the encoder, two judgements of it, 0 for none.
        trackers: `tensorboard`, `trackio` or others that accelerate knows, beside the log.
        max_non_finite: steps in a row whose loss or gradient is not finite before the run stops.
        cpu: train on the CPU even where there is a GPU.
    """

    steps: int
    batch_size: int
    accumulation: int = 1
    learning_rate: float = 5e-4
    batch_scaling: Literal["linear", "sqrt", "none"] = "linear"
    reference_batch: int = 256
    min_learning_rate: float = 1e-6
    warmup_steps: int = 0
    warmup_includes_end: bool = True
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    layer_decay: float = 1.0
    patch_embedding_rate: float = 1.0
    clip_gradient: float = 3.0
    clip_scope: Literal["parameter", "model", "module"] = "parameter"
    seed: int = 0
    init_from: str | None = None
    log_every: int = 10
    panel_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int = 0
    export_every: int = 0
    judge_every: int = 0
    trackers: list[str] = field(default_factory=list)
    max_non_finite: int = 3
    cpu: bool = False

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "reference_batch", "log_every", "panel_every")
        counts += ("checkpoint_every", "keep_checkpoints", "max_non_finite")
        require_at_least(1, **{name: getattr(self, name) for name in counts})
        from_zero = ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "final_weight_decay")
        from_zero += ("momentum", "beta1", "beta2", "layer_decay", "patch_embedding_rate", "clip_gradient")
        from_zero += ("keep_every", "export_every", "judge_every")
        require_at_least(0, **{name: getattr(self, name) for name in from_zero})
        for name in ("batch_scaling", "optimizer", "clip_scope"):
            choices = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)}: it must be one of {', '.join(choices)}")
        if self.keep_every % self.checkpoint_every:
            raise UserError(
                f"keep_every is {self.keep_every}: it must be a multiple of checkpoint_every, {self.checkpoint_every}"
            )

    def deciding(self) -> dict[str, Any]:
        """The options that decide the result; the others may change when a run goes on."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}

    def ends(self, step: int, every: int) -> bool:
        """Whether `step`, from 0, ends a stretch of `every` steps, or the run; nothing ends a stretch of 0 steps."""
        return every > 0 and ((step + 1) % every == 0 or step + 1 == self.steps)
