"""`hf-pathology demo`: the whole story, from slides to a report, on drawn slides or on yours."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from transformers import AutoConfig, ViTModel, set_seed

from ..errors import SlideError, UserError
from ..evaluation.cross_validation import CrossValidation
from ..evaluation.intervals import Interval, auc_difference
from ..features.bags import read_labelled_bags
from ..features.colour import MeanColour
from ..features.encoder import Encoder, load_encoder
from ..hub_upload.export import export_encoder
from ..progress import ProgressBar
from ..recipes.train_mil import HeadTraining, cross_validate, train_mil
from ..record import RunRecord
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from ..slides.synthetic import BLANK, write_demo_cohort
from ..slides.tiling import GridOptions, tile_slide
from ..training.config import read_yaml
from .cohort import chosen_slides
from .demo_report import write_demo_report
from .embed import embed_slides
from .launch import CONFIG, pretrain
from .tile import tile_slides


@dataclass(frozen=True)
class DemoSize:
    """How large the demo is.

    Attributes:
        cases_per_class, slide_size: of the drawn cohort; the edge of a slide in pixels.
        steps: of pretraining.
        folds, epochs: of the slide classifiers.
    """

    cases_per_class: int
    slide_size: int
    steps: int
    folds: int
    epochs: int


FULL = DemoSize(cases_per_class=20, slide_size=3000, steps=600, folds=5, epochs=40)
TINY = DemoSize(cases_per_class=3, slide_size=1024, steps=10, folds=3, epochs=10)
PATTERN_SHARE, PURITY = 0.6, 1.0  # how hard the two classes are to tell apart, see `draw_slide`


@dataclass(frozen=True)
class FeatureSet:
    """One way to describe tiles, and how good a slide classifier on it is; `validation` is None without labels."""

    title: str
    folder: Path
    validation: CrossValidation | None = None
    difference: Interval | None = None  # of the AUC of our encoder to this one, over the same cases


def demo(*, out: Path, slides: Path | None, cohort: Path | None, tiny: bool) -> int:
    """Runs the story into `out`, going on from what an earlier run has finished; returns the exit code."""
    size = TINY if tiny else FULL
    record = RunRecord("demo", {"out": out, "slides": slides, "cohort": cohort, "tiny": tiny})
    story = Story(out)

    story.tell("slides")
    drawn = slides is None
    if drawn:
        slides = out / "slides"
        cohort = draw_slides(slides, size)
    chosen = chosen_slides(slides, cohort, None, None, record)

    story.tell("tissue and grid")
    options = grid_options()
    grids = tile_slides(chosen, out / "tiles", options, record)
    if drawn:
        check_blank(slides, out, options, record)
    if not grids:
        raise UserError(f"{slides}: no slide can be used")
    of_key = {slide.key: slide for slide in chosen}
    pairs = [(of_key[grid.slide], grid) for grid in grids]

    story.tell(f"iBOT pretraining, {size.steps} steps")
    command = pretrain(slides, cohort, out, size.steps)

    story.tell("features")
    encoders = [load_encoder(out / "pretrain" / "encoder"), untrained(out), MeanColour()]
    sets = embed_all(pairs, encoders, out, record)
    if any(slide.label for slide in chosen):
        story.tell("slide classifiers")
        sets = classify(sets, cohort, out, size)

    story.tell("report")
    record.save(out / "report.json")
    validations = {found.title: found.validation for found in sets if found.validation}
    differences = {found.title: found.difference for found in sets if found.difference}
    write_demo_report(out, pairs, validations, differences, record, [record.command_line, command])
    story.end()
    print(out / "report.html")
    return record.exit_code


class Story:
    """Says which part of the demo begins, and in the end how long each took."""

    def __init__(self, out: Path):
        self.out = out
        self.times: list[tuple[str, float]] = []

    def tell(self, part: str) -> None:
        self.times.append((part, time.monotonic()))
        print(f"== {part}", file=sys.stderr, flush=True)

    def end(self) -> None:
        ends = [began for _, began in self.times[1:]] + [time.monotonic()]
        parts = ", ".join(f"{part} {end - began:.0f} s" for (part, began), end in zip(self.times, ends))
        print(f"{parts}; {ends[-1] - self.times[0][1]:.0f} s in all", file=sys.stderr)


def draw_slides(folder: Path, size: DemoSize) -> Path:
    """The table of the drawn cohort in `folder`, drawn now when it is not there."""
    table = folder / "cohort.csv"
    if table.is_file():
        return table
    with ProgressBar("drawing", 2 * size.cases_per_class + 1) as progress:
        return write_demo_cohort(
            folder,
            cases_per_class=size.cases_per_class,
            size=size.slide_size,
            pattern_share=PATTERN_SHARE,
            purity=PURITY,
            progress=lambda done, total: progress.advance(),
        )


def check_blank(slides: Path, out: Path, options: GridOptions, record: RunRecord) -> None:
    """Shows on the drawn slide of mere glass that it gets no tiles, and notes why."""
    try:
        tile_slide(CohortSlide(BLANK, slides / BLANK, BLANK), out / "tiles", options)
    except SlideError as error:
        record.leave_out(str(error))
    else:
        record.failed(f"{slides / BLANK} is mere glass and was taken for tissue")


def grid_options() -> GridOptions:
    """The tiles of the demo: of the same edge as the views of its encoder."""
    config = read_yaml(str(files("hf_pathology.recipes") / "configs" / CONFIG))
    return GridOptions(mpp=config["mpp"], tile_size=config["tile_size"], min_tissue=config["min_tissue"])


def untrained(out: Path) -> Encoder:
    """An encoder of the same architecture as the pretrained one, with random weights, released like it."""
    folder = out / "untrained" / "encoder"
    if not (folder / "config.json").is_file():
        release = load_encoder(out / "pretrain" / "encoder")
        set_seed(0)
        model = ViTModel(AutoConfig.from_pretrained(release.name), add_pooling_layer=False)
        export_encoder(
            model, folder, tile_size=release.size, mpp=release.mpp, mean=list(release.mean), std=list(release.std)
        )
    return load_encoder(folder)


def embed_all(
    pairs: Sequence[tuple[CohortSlide, TileGrid]],
    encoders: Sequence[Encoder | MeanColour],
    out: Path,
    record: RunRecord,
) -> list[FeatureSet]:
    """The features of all slides by each encoder."""
    titles = {
        "pretrained here": "features",
        "same encoder, untrained": "features_untrained",
        "colour": "features_colour",
    }
    sets = []
    for (title, folder), encoder in zip(titles.items(), encoders):
        embed_slides(pairs, encoder, out / folder, record)
        sets.append(FeatureSet(title, out / folder))
    return sets


def classify(sets: Sequence[FeatureSet], cohort: Path, out: Path, size: DemoSize) -> list[FeatureSet]:
    """The sets with the cross-validation of the same classifier on each, and the paired differences to the first."""
    training = HeadTraining(epochs=size.epochs, max_tiles=200)
    ours = train_mil(sets[0].folder, cohort, out / "mil", folds=size.folds, training=training).validation
    print(f"{sets[0].title}: AUC {ours.auc}", file=sys.stderr)
    judged = [replace(sets[0], validation=ours)]
    for other in sets[1:]:
        data = read_labelled_bags(other.folder, cohort)
        validation = cross_validate(data.bags, data.labels, data.cases, folds=size.folds, training=training)
        difference = auc_difference(
            ours.cases, ours.targets, ours.probabilities, validation.probabilities, seed=training.seed
        )
        judged.append(replace(other, validation=validation, difference=difference))
        print(f"{other.title}: AUC {validation.auc}, difference {difference}", file=sys.stderr)
    return judged
