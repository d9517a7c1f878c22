"""Recipes in processes of their own: launched as a user does, killed, launched again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_pathology.training.log import read_log


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
STEPS = 8  # of a run that is killed after the checkpoint of half of them


def launcher(recipe: str, processes: int) -> list[str]:
    """The words that launch the recipe on one process by accelerate, on more by torch."""
    if processes == 1:
        words = ["accelerate.commands.launch", "--quiet", "--config_file", str(RECIPES / "accelerate" / "cpu.yaml")]
    else:
        words = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, "-m", *words, str(RECIPES / recipe)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(words: list[str]) -> None:
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run_and_kill(words: list[str], out: Path) -> None:
    """Runs until half of the steps are saved, then kills all processes with SIGKILL."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, env=environment(), start_new_session=True, **quiet)
    waited_for = out / "checkpoints" / f"step_{STEPS // 2:08d}"
    deadline = time.monotonic() + 120
    while not waited_for.is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert waited_for.is_dir()


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors")


def assert_a_killed_run_ends_as_one_that_was_not(words_for: Callable[[Path], list[str]], folder: Path) -> None:
    """That `folder/killed` has the weights and losses of `folder/straight`, bit by bit.

    Args:
        words_for: the command for a run of STEPS steps, all in the log and every second saved, into a folder.
    """
    straight, killed = folder / "straight", folder / "killed"
    run(words_for(straight))
    run_and_kill(words_for(killed), killed)
    run(words_for(killed))
    expected, found = weights(straight), weights(killed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    losses = [[record["loss"] for record in read_log(out / "log.jsonl")] for out in (straight, killed)]
    assert len(losses[0]) == STEPS and losses[0] == losses[1]
