"""Checkpoints that are whole or absent, from which a run goes on with the same bits."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..atomic import naming_write_errors, replace_directory, write_json
from ..errors import UserError


INDEX = "checkpoint.json"  # written last: a directory without it is no checkpoint


class Checkpoints:
    """The checkpoints of one run, named by the number of optimizer steps they hold.

    A checkpoint is a directory of what accelerate saves (weights, optimizer, random states of each rank), one
    `data_<rank>.json` with each rank's place in the stream, and an index with the hash of every file.

    Args:
        folder: where the checkpoints of the run lie.
        keep: how many of the last ones stay.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int = 2):
        self.folder, self.accelerator, self.keep = Path(folder), accelerator, keep

    def save(self, step: int, data_state: dict[str, Any], config: dict[str, Any]) -> Path:
        """Writes the checkpoint after `step` steps; called by all ranks, each with its own place in the stream."""
        accelerator = self.accelerator
        path = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{path.name}.partial"
        with naming_write_errors(path):
            try:
                self._write(partial, step, data_state, config)
                if accelerator.is_main_process:
                    replace_directory(partial, path)
            finally:
                if accelerator.is_main_process:
                    shutil.rmtree(partial, ignore_errors=True)
        if accelerator.is_main_process:
            for old in self.paths()[: -self.keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return path

    def _write(self, partial: Path, step: int, data_state: dict[str, Any], config: dict[str, Any]) -> None:
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
            files = {
                str(file.relative_to(partial)): _hash(file) for file in sorted(partial.rglob("*")) if file.is_file()
            }
            index = {
                "step": step,
                "world_size": accelerator.num_processes,
                "threads": torch.get_num_threads(),
                "config": config,
                "files": files,
            }
            write_json(partial / INDEX, index)

    def load_last(self, config: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        """Restores the last whole checkpoint; returns its step and every rank's place in the stream. (0, []) without one.

        A damaged checkpoint is named in a warning and the one before it is taken. Raises UserError when the run was
        started with another `config`.
        """
        for path in reversed(self.paths()):
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            damaged = [name for name, digest in index["files"].items() if not _is_whole(path / name, digest)]
            if damaged:
                warnings.warn(
                    f"{path} is damaged ({damaged[0]}): going on from the checkpoint before it", stacklevel=2
                )
                continue
            different = [key for key in config if config[key] != index["config"].get(key)]
            if different:
                changes = ", ".join(f"{key} {index['config'].get(key)} -> {config[key]}" for key in different)
                raise UserError(
                    f"{path} belongs to a run with other options ({changes}): give them back, or choose a new --out"
                )
            if self.accelerator.device.type == "cpu":
                torch.set_num_threads(index["threads"])  # sums of another number of threads have other last bits
            self.accelerator.load_state(path)
            states = [json.loads((path / f"data_{rank}.json").read_text()) for rank in range(index["world_size"])]
            return index["step"], states
        return 0, []

    def paths(self) -> list[Path]:
        """The finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step_*") if (path / INDEX).is_file())


def _hash(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "blake2b").hexdigest()


def _is_whole(file: Path, digest: str) -> bool:
    return file.is_file() and _hash(file) == digest
