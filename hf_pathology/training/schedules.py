"""Numbers that change with every optimizer step, as functions of the step (DINO, arXiv 2104.14294, appendix)."""

import math


def cosine_with_warmup(
    step: int, total_steps: int, *, base: float, final: float, warmup_steps: int = 0, start: float = 0.0
) -> float:
    """The value at `step` (from 0): a line from `start` that reaches `base` at the last warm-up step, then a half cosine.

    The cosine starts at `base` and would reach `final` at `total_steps`, which is never asked for.
    """
    if step < warmup_steps:
        return start + (base - start) * step / max(1, warmup_steps - 1)
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * share))
