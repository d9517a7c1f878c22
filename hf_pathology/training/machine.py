"""Where and with what a run computes: one entry of `run.json` for each start, since it may go on elsewhere."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..atomic import write_json
from ..record import versions


RUN_FILE = "run.json"


def machine_of(accelerator: Accelerator) -> dict[str, Any]:
    """The kind of device, the number of processes, the precision and the versions; nothing by which the machine is known."""
    return {
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """The name of the kind of device, as its maker gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def note_start(out: Path, first_step: int, config: dict[str, Any], accelerator: Accelerator) -> None:
    """Adds to `out`/run.json that the run goes on from `first_step` on this machine; later starts are of steps made again.

    Args:
        config: every option that decides the result.
    """
    file = out / RUN_FILE
    starts = json.loads(file.read_text(encoding="utf-8"))["starts"] if file.is_file() else []
    starts = [start for start in starts if start["first_step"] < first_step]
    starts.append({"first_step": first_step, **machine_of(accelerator)})
    write_json(file, {"config": config, "starts": starts})
