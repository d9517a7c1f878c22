"""What all processes must know of a step before it is taken: one exchange between them, one wait for the device."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class Agreement:
    """The same on all processes.

    Attributes:
        loss_is_finite, gradient_is_finite: on every process.
        stop_signal: the signal that any process has had, 0 for none.
        norms: of each gradient.
        means: of the scalars, over the processes.
    """

    loss_is_finite: bool
    gradient_is_finite: bool
    stop_signal: int
    norms: list[float]
    means: dict[str, float]

    @property
    def is_finite(self) -> bool:
        return self.loss_is_finite and self.gradient_is_finite


def agree(
    accelerator: Accelerator,
    *,
    loss: torch.Tensor,
    norms: torch.Tensor,
    stop_signal: int,
    scalars: Mapping[str, torch.Tensor],
) -> Agreement:
    """What the processes make of a step, from the loss of each and the norms of the gradients, which are the same on all.

    `scalars` are what is logged; without any, almost nothing is exchanged.
    """
    norms = norms.to(loss.device)
    finite = [loss.isfinite().float(), torch.linalg.vector_norm(norms).isfinite().float()]
    mine = torch.stack(
        [*finite, torch.full_like(finite[0], stop_signal), *(value.float() for value in scalars.values())]
    )
    each = accelerator.gather(mine[None])  # (processes, 3 + scalars)
    numbers = torch.cat([each.flatten(), norms]).tolist()
    rows = [numbers[start : start + len(mine)] for start in range(0, each.numel(), len(mine))]
    losses, gradients, signals, *others = zip(*rows)
    return Agreement(
        loss_is_finite=min(losses) == 1.0,
        gradient_is_finite=min(gradients) == 1.0,
        stop_signal=int(max(signals)),
        norms=numbers[each.numel() :],
        means={name: sum(values) / len(values) for name, values in zip(scalars, others)},
    )
