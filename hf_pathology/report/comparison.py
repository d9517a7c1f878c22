"""Plots and the table of how well slides are classified from several kinds of features."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.cross_validation import CrossValidation
from ..evaluation.intervals import Interval, roc_with_band
from .page import Table
from .style import FAINT, INK, MUTED, PALETTE, plot_style


LINES = ("-", "--", "-.", ":")


@plot_style()
def roc_figure(validations: Mapping[str, CrossValidation], positive: int, *, seed: int) -> Figure:
    """The ROC curves of class `positive` against the rest, each with its 95% band over cases."""
    figure = Figure(figsize=(4.7, 4.9), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, zorder=1)
    for (name, validation), colour, line in zip(validations.items(), cycle(PALETTE), cycle(LINES)):
        band = roc_with_band(
            validation.cases, validation.targets, validation.probabilities, positive=positive, seed=seed
        )
        axes.fill_between(band.fpr, band.low, band.high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(band.fpr, band.tpr, color=colour, linestyle=line, label=name, linewidth=2)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal", anchor="N")
    axes.set(xlabel="false positive rate (1 − specificity)", ylabel="true positive rate (sensitivity)")
    axes.legend(loc="lower right")
    classes = next(iter(validations.values())).classes
    axes.set_title(f"{classes[positive]} against {classes[1 - positive] if len(classes) == 2 else 'the rest'}")
    return figure


@plot_style()
def auc_figure(aucs: Mapping[str, Interval], differences: Mapping[str, Interval]) -> Figure:
    """The AUC of each set of features and, below, what the first gains over others, both with their intervals."""
    figure = Figure(figsize=(4.7, 4.9), layout="constrained")
    figure.get_layout_engine().set(hspace=0.1)
    gains = {f"over {name}": gain for name, gain in differences.items()}
    rows = [len(part) + 1 for part in (aucs, gains) if part]
    upper, *lower = figure.subplots(len(rows), 1, height_ratios=rows, squeeze=False).flat
    draw_intervals(upper, aucs, PALETTE, reference=0.5)
    upper.set_xlim(min(0.45, *(auc.low - 0.03 for auc in aucs.values())), 1.02)
    upper.set_title("ROC-AUC")
    for axes in lower:
        draw_intervals(axes, gains, PALETTE[1:], reference=0.0)
        axes.set_title(f"Gain of {next(iter(aucs))}")
    return figure


def draw_intervals(axes: Axes, intervals: Mapping[str, Interval], colours: Sequence[str], reference: float) -> None:
    """One row for each interval, first on top, with a line at the `reference` that means no effect."""
    axes.axvline(reference, color=MUTED, linewidth=1)
    for row, (interval, colour) in enumerate(zip(intervals.values(), cycle(colours))):
        axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot(interval.value, row, "o", color=colour, markersize=7, markeredgecolor="white")
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{interval.value:.2f}", (interval.value, row), color=INK, **above)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(intervals) - 0.5, -0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def comparison_table(validations: Mapping[str, CrossValidation], differences: Mapping[str, Interval]) -> Table:
    """AUC, accuracy, and the difference of the first set to each other, with intervals."""
    first = next(iter(validations.values()))
    rows = []
    for name, validation in validations.items():
        auc, gain = validation.auc, differences.get(name)
        rows.append(
            [
                name,
                f"{auc.value:.3f}",
                between(auc),
                f"{validation.mean_metrics['balanced_accuracy']:.3f}",
                f"{gain.value:+.3f}" if gain else "–",
                between(gain) if gain else "–",
            ]
        )
    confidence = f"{first.auc.confidence:.0%}"
    columns = ["Features", "ROC-AUC", f"{confidence} interval", "Balanced accuracy", "Gain", f"{confidence} interval"]
    caption = (
        f"{len(set(first.cases))} cases in {len(np.unique(first.fold))} folds, no case in two. AUC: all cases together; "
        f"accuracy: mean over the folds. Gain: AUC of {next(iter(validations))} minus that of the row, over the same "
        "cases. Intervals: bootstrap over cases."
    )
    return Table(columns, rows, caption)


def between(interval: Interval) -> str:
    """The interval as "0.812 to 0.951"."""
    return f"{interval.low:.3f} to {interval.high:.3f}"
