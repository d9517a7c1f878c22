"""Checkpoints that are whole or absent, from which a run goes on with the same bits."""

import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..atomic import naming_write_errors, replace_directory, write_json
from ..errors import UserError
from .integrity import INDEX, damage, read_json, sealed_index
from .random_state import restore_random_state, seed_rank
from .same_run import config_hash


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: where it lies, and its index (step, layout, options)."""

    path: Path
    index: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, named by the number of optimizer steps they hold.

    A checkpoint is a directory of what accelerate saves (weights, optimizer, random states of each rank), one
    `data_<rank>.json` with each rank's place in the stream, and an index with the hash of every file and of itself.

    Args:
        folder: where the checkpoints of the run lie; all processes see it.
        keep: how many of the last ones stay.
        keep_every: those whose step is a multiple of it stay too; 0 for none.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int = 2, keep_every: int = 0):
        self.folder, self.accelerator = Path(folder), accelerator
        self.keep, self.keep_every = keep, keep_every

    def save(self, step: int, data_state: dict[str, Any], config: dict[str, Any], spent: dict[str, float]) -> Path:
        """Writes the checkpoint after `step` steps; called by all ranks, each with its own place in the stream.

        `spent` is what the run has cost so far.
        """
        accelerator = self.accelerator
        path = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{path.name}.partial"
        with naming_write_errors(path):
            try:
                self._write(partial, data_state, {"step": step, "spent": spent, "config": config})
                if accelerator.is_main_process:
                    replace_directory(partial, path)
            finally:
                if accelerator.is_main_process:
                    shutil.rmtree(partial, ignore_errors=True)
        if accelerator.is_main_process:
            self._tidy(step)
        accelerator.wait_for_everyone()
        return path

    def _write(self, partial: Path, data_state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Fills the new directory `partial` from all ranks, the index last."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(partial)
        write_json(partial / f"data_{accelerator.process_index}.json", data_state)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            layout = {
                "world_size": accelerator.num_processes,
                "device": accelerator.device.type,
                "threads": torch.get_num_threads(),
            }
            facts = {**facts, **layout, "config_hash": config_hash(facts["config"])}
            write_json(partial / INDEX, sealed_index(partial, facts))

    def _tidy(self, step: int) -> None:
        """Removes the checkpoints that have had their time, and what a killed process has left half-written."""
        finished = [path for path in self.paths() if _step_of(path) <= step]
        for old in finished[: -self.keep]:
            if not self.keep_every or _step_of(old) % self.keep_every:
                shutil.rmtree(old)
        for left in self.folder.glob(".step_*"):
            shutil.rmtree(left, ignore_errors=True)

    def find_last(self) -> Checkpoint | None:
        """The last whole checkpoint, None when there is no checkpoint at all; the main process looks for all.

        Damaged ones after it are named in a warning. Raises UserError when all are damaged.
        """
        found = [self._search() if self.accelerator.is_main_process else None]
        broadcast_object_list(found)
        if isinstance(found[0], str):
            raise UserError(found[0])
        return found[0]

    def _search(self) -> Checkpoint | str | None:
        """What `find_last` returns, or the message of its error."""
        damaged = []
        for path in reversed(self.paths()):
            what = damage(path)
            if not what:
                for name, damaged_file in damaged:
                    text = f"{name} is damaged ({damaged_file}): going on from the checkpoint before it, {path.name}"
                    warnings.warn(text, stacklevel=2)
                return Checkpoint(path, read_json(path / INDEX))
            damaged.append((path, what))
        if not damaged:
            return None
        names = ", ".join(f"{path.name} ({what})" for path, what in damaged)
        return (
            f"all checkpoints in {self.folder} are damaged: {names}; give one back from a copy, or remove that folder to "
            "start from the beginning"
        )

    def restore(self, checkpoint: Checkpoint, seed: int) -> list[dict[str, Any]]:
        """Restores what `prepare` was called with and the random generators; returns every rank's place in the stream.

        On another number of processes, or another kind of device, there are no states of the generators to restore: they
        are seeded anew from `seed`, the step and the rank, which is said.
        """
        accelerator, path, index = self.accelerator, checkpoint.path, checkpoint.index
        if index["device"] == accelerator.device.type == "cpu":
            torch.set_num_threads(index["threads"])  # sums of another number of threads have other last bits
        accelerator.load_state(path)
        before = (index["world_size"], index["device"])
        if before == (accelerator.num_processes, accelerator.device.type):
            restore_random_state(path / f"random_states_{accelerator.process_index}.pkl", accelerator.device)
        else:
            seed_rank(seed, index["step"], accelerator.process_index)
            if accelerator.is_main_process:
                print(
                    f"{path} was written by {before[0]} process(es) on {before[1]} and goes on with "
                    f"{accelerator.num_processes} on {accelerator.device.type}: the random generators are seeded anew",
                    file=sys.stderr,
                )
        return [read_json(path / f"data_{rank}.json") for rank in range(index["world_size"])]

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first, whole or damaged."""
        return step_folders(self.folder)


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, whole or damaged."""
    names = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir()]
    return sorted(names, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
