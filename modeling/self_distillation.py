"""What DINO and iBOT share: the loss between views, the centre of the teacher's scores, the EMA teacher, its temperature.

Formulas: Caron et al. 2021 (arXiv 2104.14294), section 3.1; Zhou et al. 2022 (arXiv 2111.07832), section 3.1.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


def teacher_probabilities(scores: torch.Tensor, center: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """The teacher's centred and sharpened distribution over prototypes, float32, of the shape of `scores` (..., K)."""
    return ((scores.float() - center) / temperature).softmax(dim=-1)


def view_loss(student_scores: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """The cross-entropy between each teacher view and each student view that is not the same one, a scalar.

    Args:
        student_scores: (V + L, B, K), the V global views first, in the teacher's order.
        teacher: probabilities (V, B, K).
        temperature: divides the student's scores.
    """
    n_teachers, batch, _ = teacher.shape
    n_pairs = n_teachers * (len(student_scores) - 1)
    everyone = teacher.sum(
        dim=0
    )  # (B, K): a student view has the cross-entropies with all teacher views in one product
    log_probabilities = (student_scores.float() / temperature).log_softmax(dim=-1)
    same, others = log_probabilities[:n_teachers], log_probabilities[n_teachers:]
    total = ((everyone - teacher) * same).sum() + (everyone * others).sum()
    return -total / (n_pairs * batch)


def hidden_patch_loss(
    student_scores: torch.Tensor, teacher: torch.Tensor, hidden: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The cross-entropy at the hidden patches, a mean over each image's patches, then over all images, a scalar.

    Images without a hidden patch count as zero: they dilute the mean, as in the original.

    Args:
        student_scores: (M, K) at the hidden patches, in the order of `hidden`.
        teacher: probabilities (M, K) at the same patches.
        hidden: bool (images, patches), M of them True.
    """
    log_probabilities = (student_scores.float() / temperature).log_softmax(dim=-1)
    cross_entropy = -(teacher * log_probabilities).sum(dim=-1)  # (M,)
    weight = (1.0 / hidden.sum(dim=1).clamp(min=1)).repeat_interleave(hidden.sum(dim=1))  # (M,)
    return (cross_entropy * weight).sum() / len(hidden)


class RunningCenter(nn.Module):
    """The running mean of the teacher's scores, moved once per optimizer step by all micro-batches and ranks together.

    Args:
        shape: of the centre, its last dimension K.
        momentum: share of the old centre that is kept.
    """

    def __init__(self, shape: tuple[int, ...], momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(shape))
        self._seen: torch.Tensor | None = None  # (K + 1,), sum and number of the scores seen since the last step

    def add(self, sum_of_scores: torch.Tensor, count: int) -> None:
        """Takes note of the sum (K,) of `count` rows of scores of one micro-batch."""
        seen = torch.cat([sum_of_scores.detach().float(), sum_of_scores.new_tensor([count], dtype=torch.float32)])
        self._seen = seen if self._seen is None else self._seen + seen

    def step(self) -> None:
        """Moves the centre towards the mean over what was added, on all ranks, and forgets it."""
        if self._seen is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._seen)
        mean = self._seen[:-1] / self._seen[-1].clamp(min=1)
        momentum = torch.where(self._seen[-1] > 0, self.momentum, 1.0)  # nothing seen, nothing moved
        self.value.mul_(momentum).add_(mean.view_as(self.value) * (1 - momentum))
        self.discard()

    def discard(self) -> None:
        """Forgets what was added."""
        self._seen = None


@torch.no_grad()
def move_teacher(pairs: Iterable[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """Moves each teacher's parameters to `momentum * teacher + (1 - momentum) * student`, name by name.

    Every parameter of a teacher must exist in its student; the student may have more (a mask token). Raises TypeError
    for teachers in half precision, whose steps would be rounded away.
    """
    for teacher, student in pairs:
        students = dict(student.named_parameters())
        names, targets = zip(*teacher.named_parameters())
        if any(target.dtype in (torch.float16, torch.bfloat16) for target in targets):
            raise TypeError(
                "the teacher's weights must be float32: train with autocast, not with half-precision weights"
            )
        torch._foreach_lerp_(list(targets), [students[name] for name in names], 1 - momentum)


def cosine_to(start: float, end: float, step: int, total_steps: int) -> float:
    """The value at `step` of a half cosine from `start` at step 0 that would reach `end` at `total_steps`."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total_steps))


def linear_warmup(start: float, end: float, step: int, warmup_steps: int) -> float:
    """The value at `step` of a straight line from `start` at step 0 to `end` at the last of `warmup_steps`, then `end`."""
    if step >= warmup_steps - 1:
        return end
    return start + (end - start) * step / (warmup_steps - 1)
