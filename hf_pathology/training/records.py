"""What is written down of a run as it goes: the log, the trackers, the alarm."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .alarm import Alarm
from .log import JsonLog
from .machine import note_start
from .options import TrainingOptions
from .trackers import start_trackers, track


class Records:
    """The records of one run; made on all processes, written on the main one.

    Args:
        out: gets `log.jsonl`, `run.json`, and `trackers/`.
        config: every option that decides the result, for the trackers.
        first_step: where the run starts or goes on.
        images: how many the run has seen by then.
    """

    def __init__(
        self,
        out: Path,
        options: TrainingOptions,
        config: dict[str, Any],
        accelerator: Accelerator,
        first_step: int,
        images: int,
    ):
        self.options, self.accelerator = options, accelerator
        self.log = None
        if accelerator.is_main_process:
            self.log = JsonLog(out / "log.jsonl", first_step)
            note_start(out, first_step, config, accelerator)
        self.alarm = Alarm(options.optimizer)
        self.note = ""  # what the progress bar says beside the numbers of tiles
        self._images = images
        start_trackers(accelerator, options.trackers, out, config, first_step)

    def are_due(self, step: int) -> bool:
        """Whether `step` is one to be written down."""
        return step % self.options.log_every == 0 or step % self.options.panel_every == 0

    def write(self, record: dict[str, Any]) -> None:
        """Adds the rate, the memory and the alarm to the `record` of a step, and writes it everywhere."""
        record["images_per_second"] = (record["images"] - self._images) / record["seconds"]
        self._images = record["images"]
        if self.accelerator.device.type == "cuda":
            record["max_memory"] = torch.cuda.max_memory_allocated(self.accelerator.device)  # bytes, since the start
        if alarm := self.alarm.look(record):
            record["alarm"] = alarm
            print(f"alarm at step {record['step']}: {alarm}", file=sys.stderr, flush=True)
        self.log.write(record)
        track(self.accelerator, record)
        self.note = f"loss {record['loss']:.3f}"
