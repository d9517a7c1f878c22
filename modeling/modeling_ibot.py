"""iBOT: self-distillation between views and of hidden patches (Zhou et al. 2022, arXiv 2111.07832)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, ViTModel
from transformers.utils import ModelOutput

from .collapse import effective_rank, entropy, feature_std, view_agreement
from .configuration_ibot import IbotConfig
from .drop_path import add_drop_path
from .projection_head import ProjectionHead
from .self_distillation import (
    RunningCenter,
    cosine_to,
    hidden_patch_loss,
    linear_warmup,
    move_teacher,
    teacher_probabilities,
    view_loss,
)


@dataclass
class IbotOutput(ModelOutput):
    """`loss` to go downhill on, and the detached scalars that made it."""

    loss: torch.Tensor | None = None
    cls_loss: torch.Tensor | None = None
    patch_loss: torch.Tensor | None = None


class IbotForPreTraining(PreTrainedModel):
    """A student that learns from a slowly following teacher, over views of a tile and over its hidden patches.

    The student sees the global views with patches hidden, and the local views; the teacher sees the global views whole.
    `forward` only gathers statistics; `after_step` moves the centres and the teacher, once per optimizer step.
    """

    config_class = IbotConfig
    base_model_prefix = "ibot"
    main_input_name = "global_views"

    def __init__(self, config: IbotConfig):
        super().__init__(config)
        self.student = ViTModel(config.encoder_config, add_pooling_layer=False, use_mask_token=True)
        self.teacher = ViTModel(config.encoder_config, add_pooling_layer=False)
        self.student_head, self.teacher_head = (
            ProjectionHead(
                config.encoder_config.hidden_size,
                config.out_dim,
                patch_out_dim=config.patch_out_dim,
                hidden_dim=config.head_hidden_dim,
                bottleneck_dim=config.head_bottleneck_dim,
                layers=config.head_layers,
                norm=config.head_norm,
                unit_norm=config.unit_norm,
            )
            for _ in range(2)
        )
        add_drop_path(self.student, config.drop_path_rate)
        self.center = RunningCenter((1, config.out_dim), config.center_momentum)
        self.patch_center = RunningCenter((1, 1, config.patch_out_dim or config.out_dim), config.patch_center_momentum)
        self.register_buffer("teacher_temperature", torch.tensor(0.0))
        self.register_buffer("teacher_patch_temperature", torch.tensor(0.0))
        self._last_teacher: dict[str, torch.Tensor] = {}
        self._set_temperatures(step=0)
        self.post_init()
        self.start_teacher()

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves every module as its constructor made it: the trunks by transformers' rule, the heads by DINO's."""

    @classmethod
    def from_encoder(cls, encoder: str, config: IbotConfig) -> "IbotForPreTraining":
        """A model whose student and teacher both start from the released `encoder`, a Hub id or a directory.

        `config.encoder_config` is replaced by the release's. Raises ValueError when it is no ViT or lacks weights.
        """
        encoder_config = AutoConfig.from_pretrained(encoder)
        if encoder_config.model_type != "vit":
            raise ValueError(f"{encoder} is a {encoder_config.model_type}: iBOT starts from a vit")
        release, loading = AutoModel.from_pretrained(encoder, output_loading_info=True)
        missing = [key for key in loading["missing_keys"] if not key.startswith("pooler.")]
        if missing:
            raise ValueError(f"{encoder} lacks the weights {missing[:5]}")
        config.encoder_config = encoder_config
        model = cls(config)
        weights = {key: value for key, value in release.state_dict().items() if not key.startswith("pooler.")}
        model.teacher.load_state_dict(weights)
        model.student.load_state_dict({"embeddings.mask_token": model.student.embeddings.mask_token, **weights})
        return model

    @property
    def encoder(self) -> ViTModel:
        """The part that outlives training: the teacher's trunk."""
        return self.teacher

    def train(self, mode: bool = True) -> "IbotForPreTraining":
        super().train(mode)
        self.teacher.requires_grad_(False).eval()
        self.teacher_head.requires_grad_(False)
        return self

    @torch.no_grad()
    def start_teacher(self) -> None:
        """Makes the teacher equal to the student."""
        move_teacher(self._pairs(), momentum=0.0)

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
        batch = global_views.shape[1]
        hidden = hidden.flatten(0, 1).flatten(1)  # (V * B, patches)
        with torch.no_grad():
            teacher_cls, teacher_patches = self._teach(global_views.flatten(0, 1), hidden, batch)
        tokens = self.student(
            global_views.flatten(0, 1), bool_masked_pos=hidden, interpolate_pos_encoding=True
        ).last_hidden_state  # (V * B, 1 + patches, D)
        cls_tokens = [tokens[:, 0]]
        if local_views is not None and len(local_views):
            local = self.student(local_views.flatten(0, 1), interpolate_pos_encoding=True)
            cls_tokens.append(local.last_hidden_state[:, 0])
        embeddings = self.student_head.embed(torch.cat([*cls_tokens, tokens[:, 1:][hidden]]))
        n_cls = len(embeddings) - int(hidden.sum())
        with torch.autocast(embeddings.device.type, enabled=False):
            scores = self.student_head.prototypes(embeddings[:n_cls].float())
            patch_scores = self.student_head.patch_prototypes(embeddings[n_cls:].float())
            temperature = self.config.student_temperature
            cls_loss = view_loss(scores.view(-1, batch, scores.shape[-1]), teacher_cls, temperature)
            patch_loss = hidden_patch_loss(patch_scores, teacher_patches, hidden, temperature)
            loss = self.config.cls_loss_weight * cls_loss + self.config.patch_loss_weight * patch_loss
        return IbotOutput(loss=loss, cls_loss=cls_loss.detach(), patch_loss=patch_loss.detach())

    def _teach(self, pixels: torch.Tensor, hidden: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's probabilities of the class tokens (V, B, K) and of the hidden patches (M, K)."""
        tokens = self.teacher(pixels, interpolate_pos_encoding=True).last_hidden_state
        embeddings = self.teacher_head.embed(tokens)
        with torch.autocast(pixels.device.type, enabled=False):
            embeddings = embeddings.float()
            scores = self.teacher_head.prototypes(embeddings[:, 0])
            patch_scores = self.teacher_head.patch_prototypes(embeddings[:, 1:][hidden])
            probabilities = teacher_probabilities(scores, self.center.value, self.teacher_temperature)
            patch_probabilities = teacher_probabilities(
                patch_scores, self.patch_center.value[0], self.teacher_patch_temperature
            )
            self.center.add(scores.mean(dim=0))
            # The centre is the mean score of all patches, hidden or not. Scores are linear in the embedding, so the
            # score of the mean embedding is that mean, without scoring every patch for every prototype.
            self.patch_center.add(self.teacher_head.patch_prototypes(embeddings[:, 1:].mean(dim=(0, 1))))
        self._last_teacher = {"features": tokens[:, 0].view(-1, batch, tokens.shape[-1]), "cls": probabilities}
        return probabilities.view(-1, batch, probabilities.shape[-1]), patch_probabilities

    @torch.no_grad()
    def after_step(self, step: int, total_steps: int) -> None:
        """Moves the centres and the teacher; to be called once after each optimizer step, numbered from 0."""
        self.center.step()
        self.patch_center.step()
        move_teacher(self._pairs(), cosine_to(self.config.teacher_momentum, 1.0, step, total_steps))
        self._set_temperatures(step + 1)

    def discard_step(self) -> None:
        """Forgets the statistics of micro-batches whose optimizer step is not taken."""
        self.center.discard()
        self.patch_center.discard()

    def frozen_parameters(self, step: int) -> list[nn.Parameter]:
        """The parameters that must not move at this step: the prototypes while the training is young."""
        if step >= self.config.freeze_last_layer_steps:
            return []
        return [parameter for name, parameter in self.student_head.named_parameters() if "last_layer" in name]

    @torch.no_grad()
    def collapse_panel(self) -> dict[str, float]:
        """The signs of collapse in the last micro-batch of this rank (`modeling/collapse.py`), and the norm of the centre."""
        features, probabilities = self._last_teacher["features"], self._last_teacher["cls"]
        panel = {
            "teacher_entropy": entropy(probabilities),
            "uniform_entropy": torch.tensor(float(self.config.out_dim)).log(),
            "feature_std": feature_std(features.flatten(0, 1)),
            "effective_rank": effective_rank(features.flatten(0, 1)),
            "view_agreement": view_agreement(features[:2]),
            "center_norm": self.center.value.norm(),
        }
        return {name: float(value) for name, value in panel.items()}

    def schedule_values(self, step: int, total_steps: int) -> dict[str, float]:
        """The method's own scheduled numbers at this step, for the log."""
        return {
            "teacher_momentum": cosine_to(self.config.teacher_momentum, 1.0, step, total_steps),
            "teacher_temperature": self._temperature("teacher_temperature", step),
            "teacher_patch_temperature": self._temperature("teacher_patch_temperature", step),
        }

    def _pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.teacher, self.student), (self.teacher_head, self.student_head)]

    def _temperature(self, name: str, step: int) -> float:
        start, end = getattr(self.config, f"warmup_{name}"), getattr(self.config, name)
        return linear_warmup(start, end, step, self.config.teacher_temperature_warmup_steps)

    def _set_temperatures(self, step: int) -> None:
        for name in ("teacher_temperature", "teacher_patch_temperature"):
            getattr(self, name).fill_(self._temperature(name, step))
