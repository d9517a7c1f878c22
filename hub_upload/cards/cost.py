"""What a run has cost by its own records: hours of devices from its log, energy and carbon where these were measured."""

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_pathology.errors import UserError, require_at_least
from hf_pathology.training.log import read_log
from hf_pathology.training.machine import RUN_FILE


@dataclass
class EnergyOptions:
    """What the records of a run cannot know of its energy, for the card.

    Attributes:
        energy_kwh: what was measured, by a meter or by the cluster; a codecarbon `emissions.csv` in the folder of the run
            is read without being asked for.
        carbon_intensity: grams of CO2 equivalents for each of these kWh, where they were used.
    """

    energy_kwh: float | None = None
    carbon_intensity: float | None = None

    def __post_init__(self) -> None:
        require_at_least(0, energy_kwh=self.energy_kwh, carbon_intensity=self.carbon_intensity)


NO_ENERGY = EnergyOptions()


@dataclass(frozen=True)
class Cost:
    """What is known of a run's cost; None is what was not recorded.

    Attributes:
        device_hours: hours of each kind of device, of all processes together.
        processes: how many ran at once, the numbers in the order in which they did.
        cpu_hours: of all cores.
        memory: peak of one accelerator, in bytes.
        precision: of the computation, as accelerate names it.
        energy: in kWh, and `energy_by` who says so.
        carbon: in kg of CO2 equivalents, and `carbon_by` how it was found.
    """

    device_hours: dict[str, float] = field(default_factory=dict)
    processes: tuple[int, ...] = ()
    cpu_hours: float | None = None
    memory: float | None = None
    precision: str | None = None
    energy: float | None = None
    energy_by: str = ""
    carbon: float | None = None
    carbon_by: str = ""


def cost_of_run(run: Path, steps: int, options: EnergyOptions | None = NO_ENERGY) -> Cost:
    """The cost of the first `steps` steps of the pretraining run in the folder `run`.

    Energy is measured of whole runs: with None for its options, nothing is said of it. What was computed after the last checkpoint and then lost by an interruption is in no record, nor is what ran before
    the first step.
    """
    records = [record for record in read_log(run / "log.jsonl") if record["step"] < steps]
    starts = [start for start in read_run_file(run)["starts"] if start["first_step"] < steps]
    hours: Counter[str] = Counter()
    for record in records:
        before = [start for start in starts if start["first_step"] <= record["step"]]
        if before:
            hours[before[-1]["device"]] += record["seconds"] * before[-1]["processes"] / 3600
    return Cost(
        device_hours=dict(hours),
        processes=tuple(dict.fromkeys(start["processes"] for start in starts)),
        cpu_hours=records[-1]["cpu_seconds"] / 3600 if records and "cpu_seconds" in records[-1] else None,
        memory=max((record["max_memory"] for record in records if "max_memory" in record), default=None),
        precision=", ".join(dict.fromkeys(start["mixed_precision"] for start in starts)) or None,
        **({} if options is None else energy_and_carbon(run, options)),
    )


def cost_of_seconds(seconds: float, machine: dict[str, Any], run: Path, options: EnergyOptions = NO_ENERGY) -> Cost:
    """The cost of a run of so many seconds on the `machine` that `machine_of` describes."""
    return Cost(
        device_hours={machine["device"]: seconds * machine["processes"] / 3600},
        processes=(machine["processes"],),
        precision=machine["mixed_precision"],
        **energy_and_carbon(run, options),
    )


def read_run_file(run: Path) -> dict[str, Any]:
    """`run.json`: the run's `config`, and its `starts`, where and with what each was computed; both empty without it."""
    file = run / RUN_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"config": {}, "starts": []}


def energy_and_carbon(run: Path, options: EnergyOptions) -> dict[str, Any]:
    """The fields of `Cost` about energy and carbon; carbon is estimated from energy that was measured, or not at all."""
    found: dict[str, Any] = {}
    emissions = run / "emissions.csv"
    if options.energy_kwh is not None:
        found = {"energy": options.energy_kwh, "energy_by": "as stated by those who trained it"}
    elif emissions.is_file():
        energy, carbon = read_emissions(emissions)
        found = {"energy": energy, "energy_by": "measured by codecarbon"}
        found |= {"carbon": carbon, "carbon_by": "estimated by codecarbon"}
    if found and options.carbon_intensity is not None:
        found["carbon"] = found["energy"] * options.carbon_intensity / 1000
        found["carbon_by"] = f"the energy times {options.carbon_intensity:g} g of CO2 equivalents per kWh, as stated"
    return found


def read_emissions(file: Path) -> tuple[float, float]:
    """Energy in kWh and carbon in kg of a codecarbon `emissions.csv`, in which the last row of a run holds its totals.

    Raises UserError when it is no such file.
    """
    try:
        with open(file, encoding="utf-8", newline="") as opened:
            last = {row["run_id"]: row for row in csv.DictReader(opened)}
        return (
            sum(float(row["energy_consumed"]) for row in last.values()),
            sum(float(row["emissions"]) for row in last.values()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is no emissions.csv of codecarbon ({error}): mend it, or take it out of the folder"
        ) from error
