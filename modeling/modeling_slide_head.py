"""What every head that classifies slides takes, returns and begins with, and the loss that its configuration asks for."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_slide_head import SlideHeadConfig
from .survival_loss import discrete_survival_loss


@dataclass
class SlideOutput(ModelOutput):
    """The answer of a head to a batch of B bags of N tiles.

    Attributes:
        loss: scalar, when labels were given.
        logits: (B, C).
        slide_embedding: (B, H), what the classifier sees of each slide.
        tile_scores: (B, N), the part of each tile in the embedding: they sum to 1 over a bag and are 0 on padding.
        tile_logits: (B, N, C) of heads that classify tiles too.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    slide_embedding: torch.Tensor | None = None
    tile_scores: torch.Tensor | None = None
    tile_logits: torch.Tensor | None = None


class SlideHead(PreTrainedModel):
    """What all heads begin with: they standardise the features, and leave padding alone.

    The buffers `feature_mean` and `feature_std` (D,) are 0 and 1, which changes nothing, until a recipe sets them, and are saved
    with the weights.
    """

    main_input_name = "features"

    def __init__(self, config: SlideHeadConfig):
        super().__init__(config)
        self.register_buffer("feature_mean", torch.zeros(config.input_dim))
        self.register_buffer("feature_std", torch.ones(config.input_dim))

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves every module as its constructor made it: by PyTorch's rules, as in the published heads."""
        if module is self:
            nn.init.zeros_(self.feature_mean)
            nn.init.ones_(self.feature_std)

    def standardised(self, features: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The features (B, N, D) to compute with, 0 where they are padding, and the mask (B, N). Raises as `checked_mask`."""
        mask = checked_mask(features, mask)
        features = (features - self.feature_mean) / self.feature_std
        return features.masked_fill(~mask.unsqueeze(-1), 0.0), mask

    def loss_of(self, logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
        """The loss that the configuration asks for, when there are labels."""
        return None if labels is None else slide_loss(logits, labels, self.config)


def checked_mask(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mask (B, N) to use for `features` (B, N, D). Raises ValueError for a wrong shape, type or an empty bag."""
    if mask is None:
        mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    if mask.shape != features.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"features are {tuple(features.shape)} and need a bool mask {tuple(features.shape[:2])}, "
            f"not {mask.dtype} {tuple(mask.shape)}"
        )
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"bag {empty[0]} of this batch has no real tile: leave slides without tiles out")
    return mask


def slide_loss(logits: torch.Tensor, labels: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """The mean loss over the slides, a scalar, by `config.problem_type`; where that is None, by transformers' rule.

    Args:
        logits: (B, C).
        labels: (B,) class indices for "single_label_classification"; (B, C), or (B,) when C is 1, of zeros and ones for
            "multi_label_classification", and of numbers for "regression"; int (B, 2) of interval and event for
            "discrete_survival", whose outputs are hazards, see `discrete_survival_loss`.
    """
    problem_type = config.problem_type or _implied_problem_type(logits.shape[-1], labels)
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels)
    if problem_type == "discrete_survival":
        return discrete_survival_loss(logits, labels[:, 0], labels[:, 1]).mean()
    labels = labels.to(logits.dtype).reshape(logits.shape)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    if problem_type == "regression":
        return F.mse_loss(logits, labels)
    raise ValueError(f"problem_type {problem_type!r} has no loss here")


def _implied_problem_type(num_labels: int, labels: torch.Tensor) -> str:
    """One output is a regression, whole numbers are class indices, anything else is zeros and ones for each class."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
