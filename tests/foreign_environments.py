"""Virtual environments that have torch and transformers and nothing of ours, built once and kept for later runs.

What is under test is whether released code gets along with another transformers and without our other dependencies. So
transformers comes from PyPI with what it requires, and torch is the one of the environment of the tests, lent through a
folder of links to it and to what it requires: PyPI has only the builds of torch for CUDA, of some gigabytes, and the index of
CPU builds cannot be reached from everywhere. Where HF_PATHOLOGY_TEST_TORCH names a requirement, such as torch==2.6.0, that
one is installed instead.

The environments lie in the folder that HF_PATHOLOGY_TEST_ENVIRONMENTS names, or in ~/.cache/hf_pathology/environments.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from filelock import FileLock


NO_NETWORK = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "Temporary failure in name resolution", "ProxyError")


def environment_with(requirement: str) -> Path:
    """The Python of an environment with torch and `requirement`, such as "transformers==5.9.0"; skips without a network."""
    torch = os.environ.get("HF_PATHOLOGY_TEST_TORCH")
    torch_name = re.sub(r"\W+", "-", torch or f"torch-{metadata.version('torch')}")
    own = Path.home() / ".cache" / "hf_pathology" / "environments"
    cache = Path(os.environ.get("HF_PATHOLOGY_TEST_ENVIRONMENTS", own))
    python = f"python-{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / f"{re.sub('=+', '-', requirement)}-{torch_name}-{python}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "whole").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True, symlinks=True)
            if torch is None:
                lend(folder, "torch")
            install(folder / "bin" / "python", requirement, *([] if torch is None else [torch]))
            (folder / "whole").touch()
    return folder / "bin" / "python"


def install(python: Path, *requirements: str) -> None:
    words = [python, "-m", "pip", "install", "--quiet", "--no-input", *requirements]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode and any(sign in done.stderr for sign in NO_NETWORK):
        pytest.skip(f"{' '.join(requirements)} cannot be had from PyPI")
    assert done.returncode == 0, done.stderr


def lend(environment: Path, name: str) -> None:
    """Makes the distribution `name` of this environment importable in another, with what it requires and nothing else."""
    (site,) = environment.glob("lib/python*/site-packages")
    links = environment / "lent"
    links.mkdir()
    for distribution in closure(name):
        parts = {
            file.parts[0] for file in distribution.files or () if not file.parts[0].startswith((".", "__pycache__"))
        }
        for part in parts:
            if not (links / part).exists():
                (links / part).symlink_to(distribution.locate_file(part))
    (site / "lent.pth").write_text(f"{links}\n")


def closure(name: str) -> list[metadata.Distribution]:
    """The distribution of that name and, as far as they are installed, all that it requires without extras."""
    found: dict[str, metadata.Distribution] = {}
    to_do = [name]
    while to_do:
        each = re.sub(r"[-_.]+", "-", to_do.pop()).lower()
        if each in found:
            continue
        try:
            found[each] = metadata.distribution(each)
        except metadata.PackageNotFoundError:
            continue  # for another platform
        for line in found[each].requires or ():
            if "extra ==" not in line:
                to_do.append(re.match(r"[\w.-]+", line)[0])
    return list(found.values())
