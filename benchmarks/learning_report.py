"""Tables and figures of the runs of `learning.py`.

    python benchmarks/learning_report.py benchmarks/learning/*.json --figures docs/pretraining

Accuracies are percent of the val tiles, with 95 % intervals of a bootstrap over the groups that tiles belong to;
differences are paired: both encoders answer for the same groups in every resample.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from hf_pathology.evaluation.intervals import Interval, accuracy_difference, accuracy_interval


plt.rcParams["svg.fonttype"] = "none"  # text stays text
plt.rcParams["svg.hashsalt"] = "learning"  # the same file for the same runs

Run = dict[str, Any]
SAME = ("tiles", "method", "setting", "minutes", "seed")  # in runs that are compared
COLOURS = {"dino": "C0", "ibot": "C1", "mae": "C2"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--figures", type=Path, help="folder for learning_curves.svg and learning_panels.svg")
    asked = parser.parse_args(argv)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in asked.results]
    runs.sort(key=lambda run: (run["tiles"], run["method"], run["minutes"], named(run), run["seed"]))
    longest = {(run["tiles"], run["method"]): run["minutes"] for run in runs}  # which are sorted by it
    plain = [run for run in runs if not run["changes"] and run["minutes"] == longest[run["tiles"], run["method"]]]
    print_learning(plain)
    print_changes(runs)
    if asked.figures and plain:  # changes alone have no curve of their own
        draw_curves(plain, asked.figures / "learning_curves.svg")
        draw_panels(plain, asked.figures / "learning_panels.svg")


# Tables.


def print_learning(runs: Iterable[Run]) -> None:
    print("| tiles | method, seed | images | CPU min | judged by | untrained | trained | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for run in runs:
        last = run["curve"][-1]
        for judge in run["correct"]["trained"]:
            cells = [run["tiles"], f"{run['method']}, {run['seed']}", f"{last['images']:,}"]
            cells += [f"{last['cpu_seconds'] / 60:.1f}", judge, percent(accuracy(run, "untrained", judge))]
            cells += [
                percent(accuracy(run, "trained", judge)),
                percent(gain(run, run, judge, than="untrained"), sign="+"),
            ]
            print(f"| {' | '.join(cells)} |")


def print_changes(runs: list[Run]) -> None:
    """What each change of the options did, beside the run of the same budget and seed without any."""
    print("\n| tiles, method, CPU min | change | seed | images | trained | difference to no change | to untrained |")
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        same = [other for other in runs if all(other[name] == run[name] for name in SAME)]
        base = next((other for other in same if not other["changes"]), None)
        if base is None or len(same) == 1:
            continue
        judge = next(iter(run["correct"]["trained"]))
        cells = [f"{run['tiles']}, {run['method']}, {run['minutes']:g}", named(run) or "none", str(run["seed"])]
        cells += [f"{run['curve'][-1]['images']:,}", percent(accuracy(run, "trained", judge))]
        cells += ["" if run is base else percent(gain(run, base, judge), sign="+")]
        print(f"| {' | '.join([*cells, percent(gain(run, run, judge, than='untrained'), sign='+')])} |")


def named(run: Run) -> str:
    """What was changed in the run, "" for nothing."""
    return ", ".join(f"{name} {value}" for name, value in run["changes"].items())


def correct(run: Run, which: str, judge: str) -> np.ndarray:
    return np.array(list(run["correct"][which][judge])) == "1"


def accuracy(run: Run, which: str, judge: str) -> Interval:
    return accuracy_interval(run["groups"], correct(run, which, judge), seed=0)


def gain(run: Run, other: Run, judge: str, than: str = "trained") -> Interval:
    return accuracy_difference(run["groups"], correct(run, "trained", judge), correct(other, than, judge), seed=0)


def percent(found: Interval, sign: str = "") -> str:
    value, low, high = (format(100 * each, f"{sign}.1f") for each in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


# Figures.


def draw_curves(runs: list[Run], path: Path) -> None:
    """What each method is judged by first, against images and against CPU time; a row for each version of the tiles."""
    versions = list(dict.fromkeys(run["tiles"] for run in runs))
    figure, axes = plt.subplots(len(versions), 2, figsize=(10, 3.4 * len(versions)), squeeze=False, sharey="row")
    for row, version in zip(axes, versions):
        for run in (run for run in runs if run["tiles"] == version):
            judge, line = next(iter(run["correct"]["trained"])), ("-", "--", ":")[run["seed"] % 3]
            values = [100 * point[judge] for point in run["curve"]]
            label = f"{run['method']}, seed {run['seed']}, {judge}"
            for axis, name, unit in zip(row, ("images", "cpu_seconds"), (1000, 60)):
                places = [point[name] / unit for point in run["curve"]]
                axis.plot(places, values, line, color=COLOURS[run["method"]], marker=".", label=label)
        row[0].set(title=version, xlabel="thousand images", ylabel="accuracy on val, %")
        row[1].set(title=version, xlabel="minutes of CPU time")
        row[1].legend(fontsize=7)
    finish(figure, path)


def draw_panels(runs: list[Run], path: Path) -> None:
    """The signs of collapse over the training of the methods with a teacher."""
    signs = {
        "teacher's entropy / ln K": lambda panel: panel["teacher_entropy"] / panel["uniform_entropy"],
        "KL of student and teacher, nats": lambda panel: panel["kl"],
        "effective rank of the features": lambda panel: panel["effective_rank"],
        "share of prototypes in use": lambda panel: panel["prototype_usage"],
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 6))
    for run in (run for run in runs if "teacher_entropy" in run["panels"][0]):
        for axis, (title, value) in zip(axes.flat, signs.items()):
            images = [panel["images"] / 1000 for panel in run["panels"]]
            label = f"{run['tiles']}, {run['method']}, seed {run['seed']}"
            axis.plot(images, [value(panel) for panel in run["panels"]], label=label, linewidth=1)
            axis.set(title=title, xlabel="thousand images")
    if axes[0, 1].lines:
        axes[0, 1].legend(fontsize=6)
    finish(figure, path)


def finish(figure: plt.Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    main()
