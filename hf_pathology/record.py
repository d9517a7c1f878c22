"""What a command was asked, what it did and what it could not do: `report.json`, and the exit code."""

import platform
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from .atomic import write_json
from .version import __version__


LIBRARIES = [
    "torch",
    "torchvision",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "huggingface_hub",
    "safetensors",
    "evaluate",
    "openslide-python",
    "openslide-bin",
    "numpy",
    "opencv-python-headless",
    "scikit-learn",
]


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of the libraries that decide its results."""
    found = {"python": platform.python_version(), "hf_pathology": __version__}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


class RunRecord:
    """The record of one command.

    Args:
        command: name of the verb.
        options: what it was asked.
    """

    def __init__(self, command: str, options: dict[str, Any]):
        self.command, self.options = command, options
        self.done: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        self.left_out: list[str] = []
        self.facts: dict[str, Any] = {}  # about the whole run
        self._started = time.time()

    @property
    def command_line(self) -> str:
        """What was typed, with the program's name instead of its path."""
        return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])

    def did(self, slide: str, **facts: Any) -> None:
        """Takes note that `slide` is done, with the `facts` about it."""
        self.done[slide] = facts

    def failed(self, problem: str) -> None:
        """Takes note of one thing that could not be done, and says it at once."""
        self.problems.append(problem)
        print(f"problem: {problem}", file=sys.stderr, flush=True)

    def leave_out(self, reason: str) -> None:
        """Takes note of one thing that was not meant to be done."""
        self.left_out.append(reason)

    def save(self, path: str | Path) -> None:
        """Writes the record as JSON."""
        content = {
            "command": self.command,
            "command_line": self.command_line,
            "options": {
                name: str(value) if isinstance(value, Path) else value for name, value in self.options.items()
            },
            "complete": not self.problems,
            "problems": self.problems,
            "left_out": self.left_out,
            "seconds": round(time.time() - self._started, 3),
            "versions": versions(),
            **self.facts,
            "slides": self.done,
        }
        write_json(path, content)

    @property
    def exit_code(self) -> int:
        """0 only when everything that was asked for was done."""
        return 1 if self.problems else 0
