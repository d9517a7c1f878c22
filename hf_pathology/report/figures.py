"""Plots of a pretraining run, from the records of its log: loss, schedules, signs of collapse, speed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from .images import INK, MUTED, PALETTE, plot_style


Records = Sequence[Mapping[str, Any]]
WIDTH = 9.6  # inches of a plot over the whole page

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
        axes.plot(
            bad, np.zeros(len(bad)), "x", color=PALETTE[1], transform=axes.get_xaxis_transform(), clip_on=False,
            label="not finite",
        )  # fmt: skip
    finish(axes, "Loss")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2)
    return figure


@plot_style()
def schedule_figure(records: Records) -> Figure:
    """Learning rate, weight decay, teacher momentum and temperatures over the steps."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(2, 2).flat, SCHEDULES.items()):
        for (name, label), style in zip(lines.items(), ("-", "--")):
            draw_series(axes, records, name, label=label, color=PALETTE[style == "--"], linestyle=style)
        if len(lines) > 1:
            axes.legend(loc="lower right")
        finish(axes, title)
    return figure


@plot_style()
def collapse_figure(records: Records) -> Figure:
    """Four numbers that say whether the encoder still tells tiles apart, each with how to read it."""
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08, wspace=0.05)
    for axes, (name, (title, how_to_read)) in zip(figure.subplots(2, 2).flat, COLLAPSE.items()):
        draw_series(axes, records, name, marker="o", markersize=3)
        steps, limits = series(records, "uniform_entropy")
        if name == "teacher_entropy" and len(limits):
            axes.axhline(limits[-1], color=PALETTE[1], linestyle="--", linewidth=1.2)
            axes.text(0.99, limits[-1], "ln K ", color=PALETTE[1], ha="right", va="bottom",
                      transform=axes.get_yaxis_transform())  # fmt: skip
        top = axes.get_ylim()[1] if name != "view_agreement" else 1.0
        axes.set_ylim(0, 1.1 * limits[-1] if name == "teacher_entropy" and len(limits) else 1.04 * top)
        finish(axes, "")
        axes.set_title(f"{title}\n", pad=16)
        axes.annotate(how_to_read, (0, 1), xytext=(0, 4), textcoords="offset points", xycoords="axes fraction",
                      va="bottom", color=MUTED, fontsize=8.2, linespacing=1.25)  # fmt: skip
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
            (after["tiles"] - before["tiles"]) / after["seconds"],
            after["waited_seconds"] / after["seconds"],
        )
        for before, after in zip(records, records[1:])
        if after.get("seconds", 0) > 0 and after["tiles"] > before["tiles"]
    ]
    steps, speed, waited = np.array(rows, np.float64).reshape(-1, 3).T
    return steps, speed, waited


def draw_series(axes: Axes, records: Records, name: str, **style: Any) -> None:
    """Draws the finite numbers `name`; nothing when no record carries one, and a dot when only one does."""
    steps, values = series(records, name)
    finite = np.isfinite(values)
    if finite.any():
        dot = {"marker": "o"} if finite.sum() == 1 else {}
        axes.plot(steps, np.where(finite, values, np.nan), **(style | dot))


def finish(axes: Axes, title: str) -> None:
    """Titles the axes, and labels them with few and plain numbers."""
    axes.set_title(title, pad=8)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_powerlimits((-3, 4))
    axes.yaxis.set_major_formatter(formatter)
    axes.margins(x=0.02)
