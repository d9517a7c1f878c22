"""Synthetic slides for the demo and the tests: H&E-like tissue of two classes that only their texture tells apart."""

import csv
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..atomic import atomic_path
from .aperio import write_aperio
from .histology import INKS, draw_ink, draw_outline, draw_pattern, render, stain_tissue
from .nests import LABELS, place_nests
from .tissue import Tissue


MPP = 0.5
TRUTH_DOWNSAMPLE = 4
MAX_WORKERS = 4  # each takes 0.4 GB at 3000 pixels
MIN_SIZE = 512
BLANK = "blank.svs"


@dataclass(frozen=True)
class DemoSlide:
    """What one slide of the demo cohort shows; `label` and `pen` as for `draw_slide`."""

    slide: str
    case: str
    label: str | None
    split: str
    pen: str | None


def draw_slide(
    seed: int | Sequence[int],
    label: str | None,
    size: int,
    *,
    pen: str | None = None,
    pattern_share: float = 0.45,
    purity: float = 0.9,
) -> tuple[np.ndarray, Tissue]:
    """A square slide at 0.5 mpp, uint8 RGB (size, size, 3), and where its tissue truly is, on pixels of 4 by 4.

    Args:
        seed: decides everything; another label with the same seed is the same tissue in the same colours.
        label: one of `LABELS`; None draws glass without tissue.
        pen: a key of `INKS` draws one stroke of that marker across an edge of the tissue.
        pattern_share: between 0 and 1, the share of the tissue that carries nests; less is harder.
        purity: between 0.5 and 1, the share of nests with the class's own arrangement, the others having the other
            class's; less is harder, and at 0.5 the classes are the same.

    Lumens, vacuoles and fat cells are tissue; tears, all wider than 130 um, and ink are not. Raises
    ValueError for a `size` below 512.
    """
    if size < MIN_SIZE:
        raise ValueError(f"a slide of {size} pixels has no room for a piece of tissue: draw at least {MIN_SIZE}")
    streams = np.random.SeedSequence(seed).spawn(6)
    outline_rng, nest_rng, stroma_rng, colour_rng, glass_rng, pen_rng = (np.random.default_rng(s) for s in streams)
    if label is None:
        nothing = np.zeros((size, size), np.float32)
        return render(colour_rng, glass_rng, nothing, nothing), _truth(nothing > 0)
    tissue = draw_outline(outline_rng, size)
    depth = cv2.convertScaleAbs(cv2.distanceTransform(tissue.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5))
    pattern = draw_pattern(nest_rng, tissue, pattern_share)
    nests = place_nests(nest_rng, depth, pattern, label, purity)
    image = render(colour_rng, glass_rng, *stain_tissue(stroma_rng, tissue, depth, pattern, nests))
    if pen is not None:
        tissue &= ~draw_ink(pen_rng, image, tissue, pen)
    return image, _truth(tissue)


def write_demo_cohort(
    folder: str | Path,
    *,
    cases_per_class: int = 20,
    size: int = 3000,
    seed: int = 0,
    pattern_share: float = 0.45,
    purity: float = 0.9,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The path of the table of a cohort that was drawn into `folder`.

    Args:
        cases_per_class: each case has one slide; a third of each class is the test split.
        size: edge of a slide in pixels of 0.5 um.
        pattern_share, purity: how hard the classes are to tell apart, see `draw_slide`.
        workers: processes; one for each processor, at most 4, when None, and no further process when 1.
        progress: called with the number of slides written so far, and of all.

    `folder` receives the slides (`case_00.svs` ..., half of them with a pen mark), one slide of mere glass that is not in
    the table (`blank.svs`), their true tissue (`truth/case_00.png` ...) and, last, `cohort.csv` with the columns slide,
    case, label and split.
    """
    folder = Path(folder)
    cohort = plan_cohort(cases_per_class)
    jobs = [
        (folder, slide, [seed, index], size, pattern_share, purity)
        for index, slide in enumerate([*cohort, DemoSlide(BLANK, "", None, "", None)])
    ]
    workers = min(workers or min(MAX_WORKERS, os.cpu_count() or 1), len(jobs))
    if workers == 1:
        for done, job in enumerate(jobs, start=1):
            _write_slide(*job)
            if progress is not None:
                progress(done, len(jobs))
    else:
        spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of the caller's threads
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
            futures = [pool.submit(_write_slide, *job) for job in jobs]
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(jobs))
    table = folder / "cohort.csv"
    with atomic_path(table) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["slide", "case", "label", "split"])
        rows.writerows([slide.slide, slide.case, slide.label, slide.split] for slide in cohort)
    return table


def plan_cohort(cases_per_class: int) -> list[DemoSlide]:
    """The labelled slides: classes alternate, every third case of a class is a test case, every second has a pen mark."""
    slides = []
    for index in range(cases_per_class * len(LABELS)):
        turn, label = divmod(index, len(LABELS))
        slides.append(
            DemoSlide(
                slide=f"case_{index:02d}.svs",
                case=f"case_{index:02d}",
                label=LABELS[label],
                split="test" if turn % 3 == 2 else "train",
                pen=list(INKS)[(turn // 2 + label) % len(INKS)] if turn % 2 else None,
            )
        )
    return slides


def _write_slide(
    folder: Path, slide: DemoSlide, seed: list[int], size: int, pattern_share: float, purity: float
) -> None:
    image, truth = draw_slide(seed, slide.label, size, pen=slide.pen, pattern_share=pattern_share, purity=purity)
    truth.save(folder / "truth" / Path(slide.slide).with_suffix(".png"))
    write_aperio(folder / slide.slide, image, MPP)


def _truth(tissue: np.ndarray) -> Tissue:
    edge = len(tissue) // TRUTH_DOWNSAMPLE
    share = cv2.resize(tissue.astype(np.uint8) * 255, (edge, edge), interpolation=cv2.INTER_AREA)
    return Tissue(share > 127, (len(tissue) / edge, len(tissue) / edge))
