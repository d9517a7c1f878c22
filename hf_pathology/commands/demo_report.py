"""The page at the end of the demo: everything that was made, shown."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..evaluation.cross_validation import CrossValidation
from ..evaluation.intervals import Interval
from ..features.encoder import load_encoder
from ..features.store import SlideFeatures, features_path
from ..recipes.predict_slides import load_head
from ..record import RunRecord
from ..report.classification import HeatmapExample, choose_examples, classification_section
from ..report.encoder import encoder_section
from ..report.page import KeyNumber, write_report
from ..report.sections import pretraining_section, provenance_section, slides_section
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from ..training.log import read_log
from .heatmap import paint


WHAT_THE_GAIN_SHOWS = (
    "The gain over the untrained encoder says that pretraining made the classes easier to read. It does not by itself say "
    "that the encoder learned what tissue looks like: on the drawn slides of the demo, views whose colour is changed teach "
    "an encoder to ignore stain, which is what hides the classes from an untrained one, and a control trained on views of "
    "unrelated tiles gains about as much (docs/benchmarks.md)."
)


def write_demo_report(
    out: Path,
    pairs: Sequence[tuple[CohortSlide, TileGrid]],
    validations: Mapping[str, CrossValidation],
    differences: Mapping[str, Interval],
    record: RunRecord,
    commands: Sequence[str],
) -> None:
    """Writes `out`/report.html.

    Args:
        pairs: the slides that could be used, with their grids.
        validations: of the slide classifiers, the demo's own encoder first; empty without labels.
        differences: of the AUC of the demo's own encoder to each other.
        commands: what was run, in order.
    """
    grids, labels = [grid for _, grid in pairs], {slide.key: slide.label for slide, _ in pairs}
    encoder = load_encoder(out / "pretrain" / "encoder", attention="eager")
    sections = [
        slides_section(out / "tiles", grids, labels, record.left_out + record.problems),
        pretraining_section(read_log(out / "pretrain" / "log.jsonl")),
        encoder_section(encoder, pairs),
    ]
    numbers = [KeyNumber(f"{sum(map(len, grids)):,}", f"tiles of {len(pairs)} slides")]
    if validations:
        ours = next(iter(validations.values()))
        section = classification_section(validations, differences, heatmap_examples(out, pairs, ours))
        sections.append(replace(section, text=f"{section.text}\n\n{WHAT_THE_GAIN_SHOWS}"))
        between = f"{ours.auc.low:.3f} to {ours.auc.high:.3f}"
        numbers.insert(0, KeyNumber(f"{ours.auc.value:.3f}", f"ROC-AUC of unseen cases ({between})"))
    sections.append(provenance_section(commands))
    lead = (
        f"{len(pairs)} slides were tiled, an encoder was pretrained on their tiles without labels and released as a "
        "directory that plain transformers loads, and its features were used to classify the slides."
    )
    write_report(out / "report.html", "From slides to predictions", lead, sections, numbers=numbers)


def heatmap_examples(
    out: Path, pairs: Sequence[tuple[CohortSlide, TileGrid]], validation: CrossValidation
) -> list[HeatmapExample]:
    """Some slides with the attention of the final head, and what a head that had not seen them predicted."""
    head, of_key = load_head(out / "mil" / "head"), {slide.key: slide for slide, _ in pairs}
    examples = []
    for index in choose_examples(validation):
        key, probabilities = validation.slides[index], validation.probabilities[index]
        picture, _ = paint(of_key[key], SlideFeatures.load(features_path(out / "features", key)), head)
        predicted = validation.classes[probabilities.argmax()]
        examples.append(HeatmapExample(key, validation.labels[index], predicted, float(probabilities.max()), picture))
    return examples
