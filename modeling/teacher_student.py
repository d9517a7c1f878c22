"""A student that learns from a slowly following teacher: what DINO, iBOT and DINOv2 share beside their losses."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from .collapse import effective_rank, entropy, feature_std, prototype_usage, view_agreement
from .drop_path import trunk_layers
from .packing import PACKED, can_pack, packed_tokens
from .projection_head import ProjectionHead
from .self_distillation import RunningCenter, cosine_to, linear_warmup, move_teacher
from .trunk import has_class_token, make_trunk, start_trunk, trunk_depths, trunk_tokens, trunk_weights, trunk_width


class TeacherStudent(PreTrainedModel):
    """Two trunks with heads, of which one follows the other; a method adds its losses and its centres.

    `forward` of a method only gathers statistics; `after_step` moves the centres and the teacher, once per optimizer
    step. The teacher's modules are named as the student's: `teacher` and `student`, `teacher_head` and `student_head`.
    """

    main_input_name = "global_views"
    hides_patches = False  # whether the student sees views with hidden patches
    temperatures: tuple[str, ...] = ("teacher_temperature",)  # names of config fields, with a `warmup_` beside each

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.student = make_trunk(
            config.encoder_config,
            drop_path_rate=config.drop_path_rate,
            drop_subset=getattr(config, "drop_path_subset", False),
            hides_patches=self.hides_patches,
        )
        self.teacher = make_trunk(config.encoder_config)
        self.packs = False  # whether views of several sizes go through the student in one pass
        self._last_teacher: dict[str, torch.Tensor] = {}  # of the last micro-batch, for the panel
        for name in self.temperatures:
            self.register_buffer(name, torch.tensor(0.0))
        self._set_temperatures(step=0)

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves every module as its constructor made it: the trunks by transformers' rule, the heads by DINO's."""

    def get_input_embeddings(self) -> None:
        """None: no table of embeddings is shared with an output, which is what accelerate asks before it shards."""

    def _make_heads(self, out_dim: int, patch_out_dim: int | None = None) -> tuple[ProjectionHead, ProjectionHead]:
        """A head of the student and one of the teacher."""
        config = self.config
        student, teacher = (
            ProjectionHead(
                trunk_width(config.encoder_config),
                out_dim,
                patch_out_dim=patch_out_dim,
                hidden_dim=config.head_hidden_dim,
                bottleneck_dim=config.head_bottleneck_dim,
                layers=config.head_layers,
                norm=config.head_norm,
                unit_norm=config.unit_norm,
            )
            for _ in range(2)
        )
        return student, teacher

    @classmethod
    def from_encoder(cls, encoder: str, config: PretrainedConfig) -> "TeacherStudent":
        """A method whose student and teacher both start from the released `encoder`, a Hub id or a directory.

        `config.encoder_config` is replaced by the release's. Raises ValueError when it lacks weights, or cannot be a trunk.
        """
        config.encoder_config = AutoConfig.from_pretrained(encoder)
        model = cls(config)
        weights = trunk_weights(encoder)
        start_trunk(model.student, weights)
        start_trunk(model.teacher, weights)
        return model

    @property
    def encoder(self) -> PreTrainedModel:
        """The part that outlives training: the teacher's trunk."""
        return self.teacher

    @property
    def encoder_part(self) -> PreTrainedModel:
        """The module that holds the encoder's weights: the teacher's trunk."""
        return self.teacher

    @property
    def trunks(self) -> list[PreTrainedModel]:
        """What is computed at each step."""
        return [self.student, self.teacher]

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer layers of both trunks, which are compiled one by one."""
        return [layer for trunk in self.trunks for layer in trunk_layers(trunk)]

    @property
    def centers(self) -> list[RunningCenter]:
        return [module for module in self.children() if isinstance(module, RunningCenter)]

    def train(self, mode: bool = True) -> "TeacherStudent":
        """The teacher never drops anything; only its batch norms follow the mode, for they need statistics of their own."""
        super().train(mode)
        for teacher, _ in self._pairs():
            teacher.requires_grad_(False).eval()
            for module in teacher.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train(mode)
        return self

    def suit(self, device: torch.device) -> None:
        """Chooses how to compute on `device`, which changes no result: on a GPU, views of all sizes in one packed pass.

        On a CPU packing gains nothing, and explicit attention is faster than the fused one for so few tokens.
        """
        if not has_class_token(self.student):
            return
        self.packs = device.type == "cuda" and can_pack(self.student)
        self.student.set_attn_implementation(PACKED if self.packs else "sdpa" if device.type == "cuda" else "eager")
        self.teacher.set_attn_implementation("sdpa" if device.type == "cuda" else "eager")

    @torch.no_grad()
    def start_teacher(self) -> None:
        """Makes the teacher equal to the student."""
        move_teacher(self._pairs(), momentum=0.0)

    def see(
        self, global_views: torch.Tensor, local_views: torch.Tensor | None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The student's image features ((V + L) * B, D), and the patch features (V * B, patches, D) of the global views.

        Args:
            global_views: (V, B, 3, H, W).
            local_views: (L, B, 3, H', W'), or None.
            hidden: bool (V * B, patches), what is hidden in the global views, or None.
        """
        groups = [(global_views.flatten(0, 1), hidden)]
        if local_views is not None and len(local_views):
            groups.append((local_views.flatten(0, 1), None))
        if self.packs:
            seen = packed_tokens(self.student, groups)
        else:
            seen = [trunk_tokens(self.student, *group) for group in groups]
        return torch.cat([images for images, _ in seen]), seen[0][1]

    def remember(self, features: torch.Tensor, probabilities: torch.Tensor, cls_loss: torch.Tensor) -> None:
        """Keeps what the collapse panel looks at: the teacher's features (V, B, D) and probabilities (V, B, K), the loss."""
        self._last_teacher = {"features": features, "probabilities": probabilities, "cls_loss": cls_loss.detach()}

    @torch.no_grad()
    def after_step(self, step: int, total_steps: int) -> None:
        """Moves the centres and the teacher; to be called once after each optimizer step, numbered from 0."""
        for center in self.centers:
            center.step()
        move_teacher(self._pairs(), cosine_to(self.config.teacher_momentum, 1.0, step, total_steps))
        self._set_temperatures(step + 1)

    def restart(self) -> None:
        """Puts what follows the step back to step 0, for a new run that starts from these weights."""
        self._set_temperatures(step=0)

    def discard_step(self) -> None:
        """Forgets the statistics of micro-batches whose optimizer step is not taken."""
        for center in self.centers:
            center.discard()

    def frozen_parameters(self, step: int) -> list[nn.Parameter]:
        """The parameters that must not move at this step: the prototypes while the training is young."""
        if step >= self.config.freeze_last_layer_steps:
            return []
        return [parameter for name, parameter in self.named_parameters() if "last_layer" in name]

    def depths(self) -> dict[str, int]:
        """The depth of each trained parameter, for layer-wise decay of the learning rate (`trunk_depths`)."""
        trunk = trunk_depths(self.student)
        depths = {f"student.{name}": depth for name, depth in trunk.items()}
        top = max(trunk.values())
        return {name: depths.get(name, top) for name, weight in self.named_parameters() if weight.requires_grad}

    @torch.no_grad()
    def collapse_panel(self) -> dict[str, float]:
        """The signs of collapse in the last micro-batch of this rank (`modeling/collapse.py`), and the norms of the centres."""
        features, probabilities = self._last_teacher["features"], self._last_teacher["probabilities"]
        teacher_entropy = entropy(probabilities)
        panel = {
            "teacher_entropy": teacher_entropy,
            "uniform_entropy": torch.tensor(float(probabilities.shape[-1])).log(),
            "kl": self._last_teacher["cls_loss"] - teacher_entropy,
            "prototype_usage": prototype_usage(probabilities),
            "feature_std": feature_std(features.flatten(0, 1)),
            "effective_rank": effective_rank(features.flatten(0, 1)),
            "view_agreement": view_agreement(features[:2]),
            **{name: module.value.norm() for name, module in self._named_centers()},
        }
        return {name: float(value) for name, value in panel.items()}

    def schedule_values(self, step: int, total_steps: int) -> dict[str, float]:
        """The method's own scheduled numbers at this step, for the log."""
        momentum = cosine_to(self.config.teacher_momentum, 1.0, step, total_steps)
        return {"teacher_momentum": momentum, **{name: self._temperature(name, step) for name in self.temperatures}}

    def _pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each module of the teacher with the student's of the same kind."""
        modules = dict(self.named_children())
        return [
            (module, modules["student" + name.removeprefix("teacher")])
            for name, module in modules.items()
            if name.startswith("teacher")
        ]

    def _named_centers(self) -> Iterator[tuple[str, RunningCenter]]:
        return (
            (f"{name}_norm", module) for name, module in self.named_children() if isinstance(module, RunningCenter)
        )

    def _temperature(self, name: str, step: int) -> float:
        start, end = getattr(self.config, f"warmup_{name}"), getattr(self.config, name)
        return linear_warmup(start, end, step, self.config.teacher_temperature_warmup_steps)

    def _set_temperatures(self, step: int) -> None:
        for name in self.temperatures:
            getattr(self, name).fill_(self._temperature(name, step))
