"""How good a released model is, by what its own run has recorded: each number with its interval and what it was tested on."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from hf_pathology.hub_upload.cards.names import last_part
from hf_pathology.training.log import read_log


@dataclass(frozen=True)
class Evaluation:
    """One number.

    Attributes:
        metric: its name, and `metric_type` the Hub's name of it.
        value: between 0 and 1.
        tested_on: name of the data.
        how: what was tested, and how the interval was made.
        low, high: ends of the interval, None where none was recorded.
        confidence: of the interval.
        task: the Hub's name of it.
        of_another: a number to compare with, of something else than the released model; the card alone has it.
    """

    metric: str
    metric_type: str
    value: float
    tested_on: str
    how: str
    low: float | None = None
    high: float | None = None
    confidence: float = 0.95
    task: str = "image-classification"
    of_another: bool = False

    @property
    def interval(self) -> str:
        """As the card says it."""
        return "not recorded" if self.low is None else f"{self.low:.3f} to {self.high:.3f}"

    def to_eval_result(self) -> EvalResult:
        """The same for the metadata, from which the Hub's `model-index` is made."""
        ends = {"low": self.low, "high": self.high, "confidence": self.confidence}
        return EvalResult(
            task_type=self.task,
            dataset_type="own",
            dataset_name=self.tested_on,
            metric_type=self.metric_type,
            metric_name=self.metric,
            metric_value=self.value,
            metric_args=None if self.low is None else ends,
        )


def judged(run: Path, steps: int, options: dict[str, Any]) -> list[Evaluation]:
    """What the judge said last of the encoder within the first `steps` steps of the run, if it was asked.

    Args:
        run: folder of the run, with its log.
        options: of the run; `judge` and `judge_k` are looked at.
    """
    records = [record for record in read_log(run / "log.jsonl") if "knn_accuracy" in record and record["step"] < steps]
    if not records:
        return []
    last = records[-1]
    name = last_part(str(options["judge"])) if options.get("judge") else "labelled tiles, not recorded which"
    when = "" if last["step"] + 1 == steps else f", judged after step {last['step'] + 1}"
    neighbours = f"vote of the {options.get('judge_k', 'nearest')} nearest of other labelled tiles{when}"
    if "knn_tiles" in last:
        neighbours += f"; {last['knn_tiles']:.0f} tiles of {last['knn_groups']:.0f} groups"
    ends = {}
    if math.isfinite(last.get("knn_accuracy_low", math.nan)):
        ends = {"low": last["knn_accuracy_low"], "high": last["knn_accuracy_high"]}
        neighbours += "; interval by resampling whole groups"
    return [
        Evaluation("accuracy of nearest neighbours", "accuracy", last["knn_accuracy"], name, neighbours, **ends),
        Evaluation(
            "balanced accuracy of nearest neighbours",
            "balanced_accuracy",
            last["knn_balanced_accuracy"],
            name,
            "as above, the mean over the classes",
        ),
    ]


def of_slide_head(metrics: dict[str, Any]) -> list[Evaluation]:
    """What `metrics.json` of `train_mil` says: the heads of the folds, each on cases that it had not seen."""
    tested_on = f"{sum(metrics['slides'].values())} slides of {metrics['cases']} cases, each out of its fold"
    folds = f"{len(metrics['folds'])}-fold cross-validation by case, all folds together"
    found = [
        Evaluation(
            name,
            metric_type,
            numbers["value"],
            tested_on,
            f"{folds}; interval by resampling cases{within}",
            numbers["low"],
            numbers["high"],
            numbers["confidence"],
        )
        for name, metric_type, numbers, within in (
            ("ROC-AUC of cases", "roc_auc", metrics["auc"], " within their class"),
            ("accuracy of slides", "accuracy", metrics["accuracy"], ", each with all its slides"),
        )
    ]
    balanced = metrics["mean_over_folds"]["balanced_accuracy"]
    how = f"mean over the {len(metrics['folds'])} folds"
    return [*found, Evaluation("balanced accuracy of cases", "balanced_accuracy", balanced, tested_on, how)]


def of_tile_classifier(metrics: dict[str, Any]) -> list[Evaluation]:
    """What `metrics.json` of `finetune_lora` says of its three ways, the adapter first."""
    names = {
        "lora": "with the adapter",
        "frozen_probe": "linear probe, frozen encoder",
        "colour_regression": "colour alone",
    }
    tested_on = (
        f"{last_part(metrics['options']['tiles'])}: {metrics['val_tiles']} tiles of {metrics['val_groups']} groups"
    )
    found = []
    for way, name in names.items():
        ends = metrics["accuracy_intervals"][way] or {}
        how = "held out by group" + ("; interval by resampling whole groups" if ends else "")
        more = {each: ends[each] for each in ("low", "high", "confidence") if ends} | {"of_another": way != "lora"}
        found.append(Evaluation(f"accuracy, {name}", "accuracy", metrics[way]["accuracy"], tested_on, how, **more))
        found.append(
            Evaluation(
                f"ROC-AUC, {name}",
                "roc_auc",
                metrics[way]["roc_auc"],
                tested_on,
                "held out by group",
                of_another=way != "lora",
            )
        )
    return found


def eval_results(evaluations: Iterable[Evaluation]) -> list[EvalResult] | None:
    """Those of the released model itself for the metadata, None when there is none."""
    return [each.to_eval_result() for each in evaluations if not each.of_another] or None
