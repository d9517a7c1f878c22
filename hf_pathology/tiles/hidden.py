"""Which patches of a view iBOT hides: random blocks, as in the original (Zhou et al. 2022, arXiv 2111.07832)."""

import math
from collections.abc import Sequence

import numpy as np


ASPECTS = (0.3, 1 / 0.3)  # of a block, height over width
ATTEMPTS = 10  # to place one block


def draw_hidden_share(shares: Sequence[float], spreads: Sequence[float], rng: np.random.Generator) -> float:
    """The share of patches to hide in one view: one of `shares`, varied uniformly by plus or minus its spread."""
    drawn = [
        rng.uniform(share - spread, share + spread) if spread else share for share, spread in zip(shares, spreads)
    ]
    return drawn[rng.integers(len(drawn))]


def draw_hidden_blocks(height: int, width: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Blocks of hidden patches in a grid of `height` x `width`, bool, True = hidden: at most `share` of all patches.

    Blocks are added while one can be placed within `ATTEMPTS` that hides new patches and not too many.
    """
    hidden = np.zeros((height, width), bool)
    budget = share * height * width
    least = (min(height, width) // 3) ** 2
    count = 0
    while count < budget:
        for _ in range(ATTEMPTS):
            area = least + (budget - count - least) * rng.random()  # the bounds may be reversed, as in the original
            aspect = math.exp(rng.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
            high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < high < height and 0 < wide < width):
                continue
            top, left = rng.integers(height - high + 1), rng.integers(width - wide + 1)
            block = hidden[top : top + high, left : left + wide]
            fresh = block.size - int(block.sum())
            if 0 < fresh <= budget - count:
                block[:] = True
                count += fresh
                break
        else:
            break
    return hidden
