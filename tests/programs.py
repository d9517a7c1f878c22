"""Programs of this package, run in the process of the test: to import everything anew takes more than ten seconds."""

import os
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.state import AcceleratorState, GradientState

from hf_pathology import cli
from hf_pathology.training.start import run_recipe


@dataclass(frozen=True)
class Finished:
    """What a program has left behind, named as by `subprocess.run`."""

    returncode: int
    stdout: str
    stderr: str


def run_command(*words: Any, cwd: Path | None = None) -> Finished:
    """`hf-pathology` with these words."""
    return run_here(cli.main, ["hf-pathology", *map(str, words)], cwd)


def run_recipe_here(main: Callable[..., None], *words: Any) -> Finished:
    """The recipe of this `main` with these words."""
    return run_here(lambda: run_recipe(main), ["recipe.py", *map(str, words)])


def run_here(program: Callable[[], Any], words: list[str], cwd: Path | None = None) -> Finished:
    """The program as it ends, after which arguments, environment and accelerate's state are again what they were."""
    out, err = StringIO(), StringIO()
    environment = patch.dict(os.environ, {"COLUMNS": "200"})
    with environment, patch.object(sys, "argv", words), chdir(cwd or "."), redirect_stdout(out), redirect_stderr(err):
        try:
            program()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    return Finished(code, out.getvalue(), err.getvalue())
