"""What a flipped bit in a stored JPEG tile does, and how much of it `tile --verify` finds.

    python benchmarks/damage.py [SLIDE ...]

Flips one bit in 200 copies of a drawn slide, decodes the stored tile it lies in, and compares. Then looks at stored tiles of
the whole slides given (those of benchmarks/slides.py, say), of which none should be suspect.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import tifffile

from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.integrity import look_at
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.synthetic import draw_slide


TRIES = 200
STEP = 3  # every third stored tile of a whole slide is looked at


def main(paths: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outcomes = flip_bits(Path(folder))
    print("| decodes to | files | found by --verify |")
    print("|---|---|---|")
    for kind in sorted({kind for kind, _ in outcomes}):
        found, missed = outcomes[kind, True], outcomes[kind, False]
        print(f"| {kind} | {found + missed} | {found} |")
    for path in paths:
        with Slide(path) as slide:
            level = slide.level_for((1.0, 1.0))
            numbers = np.arange(0, level.stored.columns * level.stored.rows, STEP)
            suspect = look_at(slide, level, numbers).suspect
        print(f"{path}: {suspect.sum()} of {len(numbers)} stored tiles suspect")


def flip_bits(folder: Path) -> Counter:
    """How often a flipped bit did what, and was found."""
    whole = folder / "whole.svs"
    write_aperio(whole, draw_slide(1, "glandular", 2048)[0], 0.5, quality=70)
    with tifffile.TiffFile(whole) as tiff:
        offsets, counts = tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts
    content, rng, outcomes = whole.read_bytes(), np.random.default_rng(0), Counter()
    for _ in range(TRIES):
        number = int(rng.integers(len(offsets)))
        damaged = bytearray(content)
        damaged[offsets[number] + int(rng.integers(counts[number]))] ^= 1 << int(rng.integers(8))
        path = folder / "damaged.svs"
        path.write_bytes(bytes(damaged))
        right, wrong = decoded(whole, number), decoded(path, number)
        kind = "nothing" if wrong is None else change(np.abs(right.astype(float) - wrong).mean())
        with Slide(path) as slide:
            found = look_at(slide, slide.level_for((1.0, 1.0)), np.array([number])).suspect[0]
        outcomes[kind, bool(found)] += 1
    return outcomes


def decoded(path: Path, number: int) -> np.ndarray | None:
    """The pixels of a stored tile of level 0, or None when it cannot be decoded."""
    with Slide(path) as slide:
        level = slide.level_for((1.0, 1.0)).stored
        pixels = np.empty((level.tile[1], level.tile[0], 3), np.uint8)
        row, column = divmod(number, level.columns)
        try:
            level.decode(slide.file, column, row, pixels)
        except ValueError:
            return None
        return pixels


def change(difference: float) -> str:
    """In words, how far pixels are from the right ones on average, of 255."""
    if difference == 0:
        return "the same pixels"
    return next(
        (f"others, by less than {limit} on average" for limit in (1, 4, 16) if difference < limit),
        "others, by 16 and more on average",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
