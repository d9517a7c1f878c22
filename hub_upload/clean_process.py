"""Runs `verify_release.py` in a process that knows nothing of this package, of the user's caches and of the network."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from hf_pathology.errors import UserError


def verify_in_clean_process(folder: str | Path, *, trust_remote_code: bool = False) -> str:
    """How well the release in `folder` agrees with its fingerprint, in words.

    The process is Python's isolated mode, cannot import this package, has an empty Hugging Face cache and neither token nor network.
    Raises UserError when the release does not load whole there, or gives other features.
    """
    folder = Path(folder).resolve()
    spec = find_spec("hf_pathology.hub_upload.verify_release")
    words = [sys.executable, "-I", spec.origin, str(folder), *(["--trust-remote-code"] if trust_remote_code else [])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    with tempfile.TemporaryDirectory() as home:
        environment |= {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        ran = subprocess.run(
            words, env=environment, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    try:
        answer = json.loads(ran.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        last = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
        raise UserError(f"{folder} cannot be verified in a process of its own: {last}") from error
    if "error" in answer:
        raise UserError(f"{folder} fails in a process without this package: {remedy_of(answer['error'])}")
    told = "".join(f"; it warns: {text}" for text in answer["warnings"])
    return f"loads whole, and its features are {answer['agreement']} ({answer['with']}){told}"


def remedy_of(reason: str) -> str:
    """The reason, with what to do where that is known."""
    if "trust_remote_code" in reason:
        return "it comes with code that is not this package's: look at the code, and pass --trust-remote-code"
    return reason[:400]
