"""Plots of a pretraining run, from the records of its log: loss, schedules, signs of collapse, speed."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .style import INK, MUTED, PALETTE, WIDTH, plot_style


Records = Sequence[Mapping[str, Any]]
ROUND = (1, 2, 2.5, 5, 10)  # what ticks may be multiples of

LOSSES = {"loss": "total", "cls_loss": "class token", "patch_loss": "hidden patches"}
SCHEDULES = {
    "Learning rate": {"learning_rate": ""},
    "Weight decay": {"weight_decay": ""},
    "Teacher momentum": {"teacher_momentum": ""},
    "Teacher temperature": {"teacher_temperature": "class token", "teacher_patch_temperature": "hidden patches"},
}
COLLAPSE = {
    "teacher_entropy": (
        "Teacher entropy (nats)",
        "Healthy between the dashed line (ln K: all prototypes alike)\nand 0 (one prototype takes every tile).",
    ),
    "feature_std": (
        "Feature standard deviation",
        "1 when features spread over the whole sphere; near 0\nall tiles have become the same vector.",
    ),
    "effective_rank": (
        "Effective rank",
        "How many dimensions the features really use;\nit should not keep falling.",
    ),
    "view_agreement": (
        "Agreement of views (nearest neighbour)",
        "Share of tiles whose nearest neighbour is their own other\nview; it rises as the encoder learns to tell tiles apart.",
    ),
}


def series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, float64 (n,), of the records that carry the number `name`."""
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


@plot_style()
def loss_figure(records: Records) -> Figure:
    """The losses of the run; steps whose loss was not finite are marked on the axis."""
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    axes = figure.subplots()
    for (name, label), colour in zip(LOSSES.items(), (INK, *PALETTE)):
        draw_series(axes, records, name, label=label, color=colour)
    steps, losses = series(records, "loss")
    bad = steps[~np.isfinite(losses)]
    if len(bad):
        on_axis = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(bad, np.zeros(len(bad)), "x", color=PALETTE[1], label="not finite", **on_axis)
    finish(axes, "Loss")
    if axes.lines:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2)
    return figure


@plot_style()
def schedule_figure(records: Records) -> Figure:
    """Learning rate, weight decay, teacher momentum and temperatures over the steps, as far as the method has them."""
    shown = {title: lines for title, lines in SCHEDULES.items() if any(has(records, name) for name in lines)}
    figure = Figure(figsize=(WIDTH, 2.2 * rows_of(shown)), layout="constrained")
    for axes, (title, lines) in zip(pairs_of_axes(figure, shown), shown.items()):
        for (name, label), line, colour in zip(lines.items(), ("-", "--"), PALETTE):
            draw_series(axes, records, name, label=label, color=colour, linestyle=line)
        if len(lines) > 1 and axes.lines:
            axes.legend(loc="lower right")
        finish(axes, title)
    return figure


@plot_style()
def collapse_figure(records: Records) -> Figure:
    """The numbers that say whether the encoder still tells tiles apart, each with how to read it."""
    shown = {name: words for name, words in COLLAPSE.items() if has(records, name)}
    figure = Figure(figsize=(WIDTH, 3.0 * rows_of(shown)), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08, wspace=0.05)
    for axes, (name, (title, how_to_read)) in zip(pairs_of_axes(figure, shown), shown.items()):
        draw_series(axes, records, name, marker="o", markersize=3)
        tops = [axes.get_ylim()[1]]
        if name == "teacher_entropy" and has(records, "uniform_entropy"):
            tops.append(draw_limit(axes, series(records, "uniform_entropy")[1][-1], "ln K"))
        axes.set_ylim(0, 1.0 if name == "view_agreement" else 1.05 * max(tops))
        finish(axes, f"{title}\n", pad=16)
        axes.annotate(
            how_to_read,
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, 4),
            textcoords="offset points",
            va="bottom",
            color=MUTED,
            fontsize=8.2,
            linespacing=1.25,
        )
    return figure


@plot_style()
def speed_figure(records: Records) -> Figure:
    """Tiles per second, and the share of the time that was spent waiting for tiles to be read."""
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    speed, waiting = figure.subplots(1, 2)
    steps, tiles_per_second, waited = throughput(records)
    speed.plot(steps, tiles_per_second, color=PALETTE[0])
    waiting.plot(steps, 100 * waited, color=PALETTE[1])
    speed.set_ylim(0, 1.1 * max(tiles_per_second, default=1))
    waiting.set_ylim(0, max(10, 110 * max(waited, default=0)))
    finish(speed, "Tiles per second")
    finish(waiting, "Time spent waiting for tiles (%)")
    return figure


def throughput(records: Records) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, tiles per second, and share of time spent waiting, float64 (n,), between neighbouring records."""
    rows = [
        (
            after["step"],
            (after["images"] - before["images"]) / after["seconds"],
            after["waited_seconds"] / after["seconds"],
        )
        for before, after in zip(records, records[1:])
        if after.get("seconds", 0) > 0 and after["images"] > before["images"]
    ]
    steps, speed, waited = np.array(rows, np.float64).reshape(-1, 3).T
    return steps, speed, waited


def has(records: Records, name: str) -> bool:
    """Whether any record carries the number `name`."""
    return len(series(records, name)[0]) > 0


def rows_of(shown: Collection) -> int:
    """How many rows of two the plots take, at least one."""
    return max(1, math.ceil(len(shown) / 2))


def pairs_of_axes(figure: Figure, shown: Collection) -> list[Axes]:
    """One pair of axes for each of the plots, two in a row; a place that is left over stays empty."""
    places = list(figure.subplots(rows_of(shown), 2, squeeze=False).flat)
    for place in places[len(shown) :]:
        place.set_axis_off()
    return places[: len(shown)]


def draw_series(axes: Axes, records: Records, name: str, **style: Any) -> None:
    """Draws the finite numbers `name`; nothing when no record carries one, and a dot when only one does."""
    steps, values = series(records, name)
    finite = np.isfinite(values)
    if finite.any():
        dot = {"marker": "o"} if finite.sum() == 1 else {}
        axes.plot(steps, np.where(finite, values, np.nan), **(style | dot))


def draw_limit(axes: Axes, value: float, name: str) -> float:
    """Draws a dashed line at `value`, with its name below the right end, and returns the value."""
    axes.axhline(value, color=PALETTE[1], linestyle="--", linewidth=1.2)
    right = axes.get_yaxis_transform()
    axes.text(0.99, 0.98 * value, name, color=PALETTE[1], ha="right", va="top", transform=right)
    return value


def finish(axes: Axes, title: str, pad: float = 8) -> None:
    """Titles the axes, `pad` points above them, and labels them with few and plain numbers."""
    axes.set_title(title, pad=pad)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.margins(x=0.02)
