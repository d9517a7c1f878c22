"""Numbers that change with every optimizer step, as functions of the step (DINO, arXiv 2104.14294, appendix)."""

import math
from typing import Literal


def cosine_with_warmup(
    step: int,
    total_steps: int,
    *,
    base: float,
    final: float,
    warmup_steps: int = 0,
    start: float = 0.0,
    includes_end: bool = True,
) -> float:
    """The value at `step` (from 0): a line from `start` to `base`, then a half cosine.

    The line reaches `base` at the last warm-up step, as DINO has it, or at the step after it, where MAE's fractional
    epochs reach it, when it does not include its end. The cosine starts at `base` and would reach `final` at
    `total_steps`, which is never asked for.
    """
    if step < warmup_steps:
        return start + (base - start) * step / (max(1, warmup_steps - 1) if includes_end else warmup_steps)
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * share))


def scaled_rate(rate: float, tiles_a_step: int, reference: int, scaling: Literal["linear", "sqrt", "none"]) -> float:
    """The learning rate for `tiles_a_step` of a `rate` that was given for `reference` tiles a step.

    Linear: Goyal et al. 2017, arXiv 1706.02677 (DINO, iBOT, MAE); by the square root: DINOv2, arXiv 2304.07193.
    """
    return rate * (tiles_a_step / reference) ** {"linear": 1.0, "sqrt": 0.5, "none": 0.0}[scaling]
