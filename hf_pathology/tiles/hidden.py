"""Which patches of a view are hidden from the student: iBOT's blocks, DINOv2's, or single patches.

iBOT: Zhou et al. 2022, arXiv 2111.07832. DINOv2, whose blocks are BEiT's: Oquab et al. 2023, arXiv 2304.07193. Hiding
exactly as many patches as were asked for: DINOv3, Siméoni et al. 2025, arXiv 2508.10104.

While blocks are laid, the hidden patches of a view are the bits of one integer, row after row: to lay a block and to
count what it hides anew are then single operations, many times faster than the same on an array of a few patches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..errors import UserError


ASPECTS = (0.3, 1 / 0.3)  # of a block, height over width
ATTEMPTS = 10  # to place one block
DINOV2_LEAST = 4  # patches; the smallest area of a block
DINOV2_MOST = 0.5  # share of all patches; the largest area of a block


@dataclass
class HiddenOptions:
    """Which patches of the global views are hidden; the numbers are those of iBOT as published.

    Attributes:
        hidden_shares, hidden_spreads: each global view hides one of the shares of its patches, varied uniformly by plus
            or minus its spread.
        hidden_shape: `block`s of neighbouring patches, or single patches at `random`.
        hidden_block_rule: how large a block is: by the rule of `ibot`, or of `dinov2`, whose blocks may be smaller.
        hidden_exact: make up with single patches for what the blocks leave of the share.
    """

    hidden_shares: list[float] = field(default_factory=lambda: [0.0, 0.3])
    hidden_spreads: list[float] = field(default_factory=lambda: [0.0, 0.2])
    hidden_shape: Literal["block", "random"] = "block"
    hidden_block_rule: Literal["ibot", "dinov2"] = "ibot"
    hidden_exact: bool = False

    def __post_init__(self):
        shares, spreads = self.hidden_shares, self.hidden_spreads
        if not shares or len(shares) != len(spreads):
            raise UserError(f"hidden_shares is {shares} and hidden_spreads {spreads}: give a spread for each share")
        for share, spread in zip(shares, spreads):
            if not (spread >= 0 and share - spread >= -1e-9 and share + spread <= 1 + 1e-9):
                raise UserError(
                    f"hidden_shares is {shares} and hidden_spreads {spreads}: {share} -+ {spread} must lie within 0 and 1"
                )
        for name, known in (("hidden_shape", ("block", "random")), ("hidden_block_rule", ("ibot", "dinov2"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)}: it must be one of {', '.join(known)}")


class HiddenPatches:
    """Draws the hidden patches of views of `height` x `width` patches.

    Raises UserError when there are no patches: the view is smaller than a patch.
    """

    def __init__(self, options: HiddenOptions, height: int, width: int):
        if height < 1 or width < 1:
            raise UserError(f"a view has {height} x {width} patches: choose a larger view or smaller patches")
        self.options, self.height, self.width = options, height, width

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The hidden patches of one view, bool (height, width), True = hidden."""
        options, height, width = self.options, self.height, self.width
        share = draw_hidden_share(options.hidden_shares, options.hidden_spreads, rng)
        if options.hidden_shape == "random":
            return fill_up(np.zeros((height, width), bool), int(share * height * width), rng)
        hidden = draw_hidden_blocks(height, width, share, rng, rule=options.hidden_block_rule)
        return fill_up(hidden, int(share * height * width), rng) if options.hidden_exact else hidden


def draw_hidden_share(shares: Sequence[float], spreads: Sequence[float], rng: np.random.Generator) -> float:
    """The share of patches to hide in one view: one of `shares`, varied uniformly by plus or minus its spread."""
    choice = int(rng.random() * len(shares))
    return shares[choice] + (2 * rng.random() - 1) * spreads[choice]


def draw_hidden_blocks(
    height: int, width: int, share: float, rng: np.random.Generator, rule: Literal["ibot", "dinov2"] = "ibot"
) -> np.ndarray:
    """Blocks of hidden patches in a grid of `height` x `width`, bool, True = hidden: at most `share` of all patches.

    Blocks are added while one can be placed within `ATTEMPTS` that hides new patches and not too many. The two rules
    differ in the area of a block, drawn uniformly between a smallest and a largest one: iBOT's are the square of a third of
    the shorter edge and all that is left to hide, DINOv2's are 4 patches and what is left, or half of all patches. Where
    the smallest is larger than what is left, the bounds are reversed, as in the originals.
    """
    total = height * width
    if rule == "ibot":
        budget, least, most = share * total, (min(height, width) // 3) ** 2, total
    else:
        budget, least, most = int(share * total), DINOV2_LEAST, DINOV2_MOST * total
    low, high = math.log(ASPECTS[0]), math.log(ASPECTS[1])
    column = [((1 << width * rows) - 1) // ((1 << width) - 1) for rows in range(height)]  # a bit in each of some rows
    random = rng.random
    hidden = count = 0
    while budget - count >= 1:
        for _ in range(ATTEMPTS):
            area = least + (min(budget - count, most) - least) * random()
            stretch = math.exp(0.5 * (low + (high - low) * random()))  # the root of the aspect
            rows, columns = round(math.sqrt(area) * stretch), round(math.sqrt(area) / stretch)
            if not (0 < rows < height and 0 < columns < width):
                continue
            top, left = int(random() * (height - rows + 1)), int(random() * (width - columns + 1))
            block = ((1 << columns) - 1) * column[rows] << (top * width + left)
            fresh = (block & ~hidden).bit_count()
            if 0 < fresh <= budget - count:
                hidden |= block
                count += fresh
                break
        else:
            break
    bits = np.frombuffer(hidden.to_bytes(-(-total // 8), "little"), np.uint8)
    return np.unpackbits(bits, count=total, bitorder="little").view(bool).reshape(height, width)


def fill_up(hidden: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`hidden` with further patches hidden at random, until there are `count`; as it is when there are as many already."""
    missing = count - int(hidden.sum())
    if missing > 0:
        hidden.flat[rng.permutation(np.flatnonzero(~hidden))[:missing]] = True
    return hidden
