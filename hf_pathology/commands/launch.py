"""Launches the demo's pretraining as a user would, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path

from ..errors import UserError


CONFIG = "ibot_demo.yaml"


def pretrain(slides: Path, cohort: Path | None, out: Path, steps: int) -> str:
    """Launches the recipe as a user would, and returns the command."""
    with as_file(files("hf_pathology.recipes")) as recipes:
        words = [
            *["accelerate", "launch", "--quiet", "--config_file", str(recipes / "accelerate" / "cpu.yaml")],
            *["--num_cpu_threads_per_process", str(os.cpu_count() or 1)],
            *[str(recipes / "pretrain_ibot.py"), "--config", str(recipes / "configs" / CONFIG)],
            *["--slides", str(slides), "--out", str(out / "pretrain"), "--grids", str(out / "tiles")],
            *["--steps", str(steps), *(["--cohort", str(cohort)] if cohort else [])],
        ]
        code = run_to_the_end([sys.executable, "-m", "accelerate.commands.launch", *words[2:]])
    if code != 0 and not (out / "pretrain" / "encoder" / "config.json").is_file():
        raise UserError("pretraining did not finish; the same command goes on from its last checkpoint")
    return " ".join(words)


def run_to_the_end(words: Sequence[str]) -> int:
    """The exit code of a command; on Ctrl-C its processes are asked to stop, and waited for while they save themselves.

    They have a session of their own, so that Ctrl-C in the terminal does not reach the launcher, which would not wait.
    """
    process = subprocess.Popen(words, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        with suppress(ProcessLookupError):
            while True:  # until no process of the session is left
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        raise
