"""The part of a report that says how well slides are classified, and where the classifier looks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluation.cross_validation import CrossValidation
from ..evaluation.intervals import Interval
from .comparison import auc_figure, comparison_table, roc_figure
from .images import jpeg_uri, svg_uri
from .page import Picture, Section


GAIN_CAPTION = (
    "Above, against chance at 0.5. Below, paired differences over the same cases: an interval that stays right of 0 "
    "speaks for a gain beyond the chance choice of cases."
)


@dataclass(frozen=True)
class HeatmapExample:
    """A slide beside where the classifier looks.

    Attributes:
        slide: its key.
        label, predicted: its class, and the one that it was given when it was not trained on.
        probability: of the predicted class.
        picture: uint8 (h, w, 3), of `attention_picture`.
    """

    slide: str
    label: str
    predicted: str
    probability: float
    picture: np.ndarray


def choose_examples(validation: CrossValidation, wrong: int = 2) -> list[int]:
    """The slides to show: of each class the most surely right one, then the `wrong` most surely wrong ones; indices."""
    predicted = validation.probabilities.argmax(axis=1)
    sure = validation.probabilities.max(axis=1)
    right = predicted == validation.targets
    order = (-sure).argsort(kind="stable")
    best = [next((i for i in order if right[i] and predicted[i] == c), None) for c in range(len(validation.classes))]
    return [int(i) for i in best if i is not None] + [int(i) for i in order if not right[i]][:wrong]


def classification_section(
    validations: Mapping[str, CrossValidation],
    differences: Mapping[str, Interval],
    examples: Sequence[HeatmapExample] = (),
    *,
    seed: int = 0,
) -> Section:
    """Table, ROC curves and intervals of several sets of features over the same cases, then heat maps.

    Args:
        validations: by the name of the features; the first is the one that is reported on.
        differences: AUC of the first minus that of another, by the other's name.
        examples: in the order in which to show them.
        seed: of the bands of the curves.
    """
    first = next(iter(validations.values()))
    several = len(first.classes) > 2
    positives = range(len(first.classes)) if several else [1]
    figures = [
        Picture(
            svg_uri(roc_figure(validations, positive, seed=seed)),
            "Curves of slides that the classifier had not seen, with pointwise 95% bands over cases.",
            title="ROC.",
            width="half",
        )
        for positive in positives
    ]
    figures.append(
        Picture(
            svg_uri(auc_figure({name: validation.auc for name, validation in validations.items()}, differences)),
            GAIN_CAPTION if differences else "Against chance at 0.5.",
            title="AUC and gain." if differences else "AUC.",
            width="half",
        )
    )
    figures += [example_figure(example) for example in examples]
    trained = (
        "The same attention classifier was trained on each set of features"
        if differences
        else "An attention classifier was trained on the features"
    )
    text = f"{trained} and tested by cross-validation on cases that it had not seen."
    if several:
        text += " AUCs are means over the classes, each against the rest."
    if examples:
        text += (
            "\n\nThe heat maps rank the tiles of one slide by the attention that the final classifier, trained on all "
            "slides, pays to them. Every slide has a highest tile, so red does not say how sure the classifier is; the "
            "prediction beside it is that of the cross-validation."
        )
    return Section("Slide classification", text, figures, [comparison_table(validations, differences)])


def example_figure(example: HeatmapExample) -> Picture:
    """The example with a caption that says whether the prediction was right."""
    right = example.label == example.predicted
    verdict = "rightly classified" if right else f"wrongly classified as {example.predicted}"
    caption = f"{example.label}, {verdict} (probability {example.probability:.2f})."
    return Picture(jpeg_uri(example.picture), caption, title=f"{example.slide}:")
