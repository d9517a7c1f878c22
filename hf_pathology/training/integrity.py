"""The index of a checkpoint: a hash of every file and of the index itself, by which any damage is found."""

import hashlib
import json
from pathlib import Path
from typing import Any


INDEX = "checkpoint.json"


def sealed_index(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The index of the finished `folder`: the `facts`, the hash of each of its files, and its own `seal`."""
    files = {str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    index = {**facts, "files": files}
    return {**index, "seal": _seal(index)}


def damage(folder: Path, only: str = "") -> str:
    """The first file of the checkpoint `folder` that is not as it was written, or empty words when it is whole.

    Args:
        only: looks at the files whose names start with this, beside the index.
    """
    try:
        index = read_json(folder / INDEX)
        seal = index.pop("seal")
        files = index["files"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return INDEX
    if seal != _seal(index):
        return INDEX
    damaged = (
        name
        for name, digest in files.items()
        if name.startswith(only) and not ((folder / name).is_file() and file_hash(folder / name) == digest)
    )
    return next(damaged, "")


def read_json(file: Path) -> Any:
    """The content of the JSON `file`."""
    return json.loads(file.read_text(encoding="utf-8"))


def file_hash(file: Path) -> str:
    """The BLAKE2 hash of the bytes of `file`."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "blake2b").hexdigest()


def _seal(index: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(index, sort_keys=True).encode(), digest_size=16).hexdigest()
