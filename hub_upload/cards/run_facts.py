"""What a pretraining run has recorded of itself, read from its folder for a card: `log.jsonl`, `run.json`, `config.yaml`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pathology.hub_upload.cards.card import CardOptions, number
from hf_pathology.hub_upload.cards.cost import Cost, cost_of_run, read_run_file
from hf_pathology.hub_upload.cards.evaluations import Evaluation, judged
from hf_pathology.hub_upload.cards.names import last_part
from hf_pathology.training.config import read_yaml
from hf_pathology.training.log import read_log


BESIDE = ("tiles_a_step", "mixed_precision")  # what decides the result beside the options
LIBRARIES = ("python", "hf_pathology", "torch", "transformers")  # whose versions a card names


@dataclass(frozen=True)
class RunFacts:
    """What a card says of a run.

    Attributes:
        licence: of the release.
        steps: lines about how far it went.
        options: every option that decided the result.
        cost: by its records.
        evaluations: by its judge, the last ones.
        provenance: versions, and where the weights started from when not from a release.
    """

    licence: str | None
    steps: tuple[str, ...]
    options: dict[str, Any]
    cost: Cost
    evaluations: tuple[Evaluation, ...]
    provenance: dict[str, Any]

    def for_skeleton(self) -> dict[str, Any]:
        """The arguments of `Facts` that a run alone decides."""
        return {
            "licence": self.licence,
            "steps": self.steps,
            "options": self.options,
            "cost": self.cost,
            "evaluations": self.evaluations,
        }


def read_run(run: Path, *, done: int, planned: int, card: CardOptions, config: dict[str, Any]) -> RunFacts:
    """The facts of the run in the folder `run` at the time when `done` of its `planned` steps were done.

    Args:
        config: every option that decided its result.
    """
    records = [record for record in read_log(run / "log.jsonl") if record["step"] < done]
    options = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    written = read_run_file(run)
    starts = [start for start in written["starts"] if start["first_step"] < done]
    versions = [start["versions"] for start in starts]
    provenance = {
        f"version of {library}": ", then ".join(dict.fromkeys(each.get(library, "") for each in versions)) or None
        for library in LIBRARIES
    }
    if config.get("init_from"):
        provenance["started from the weights of the run"] = last_part(str(config["init_from"]))
    return RunFacts(
        licence=card.licence,
        steps=tuple(steps_taken(records, done, planned)),
        options={**config, **{name: written["config"].get(name) for name in BESIDE if written["config"]}},
        cost=cost_of_run(run, done, card if done == planned else None),
        evaluations=tuple(judged(run, done, options)),
        provenance=provenance,
    )


def steps_taken(records: list[dict[str, Any]], done: int, planned: int) -> list[str]:
    """How far the run had gone, and what the log says last."""
    last = records[-1] if records else {}
    steps = f"{done} steps" if done == planned else f"{done} of {planned} steps: an encoder on the way"
    images = (
        f"{last['images']:,.0f} tiles or regions seen by step {last['step'] + 1}" if last else "images: not recorded"
    )
    loss = last.get("loss", math.nan)
    logged = "not recorded" if math.isnan(loss) else f"{loss:.3f}"
    hours = sum(record["seconds"] for record in records) / 3600
    clock = (
        f"{number(hours)} hours by the clock, of the logged steps" if records else "hours by the clock: not recorded"
    )
    return [f"{steps}; last logged loss {logged}", images, clock]
