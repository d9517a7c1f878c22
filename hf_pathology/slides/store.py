"""Small arrays with their metadata in one safetensors file, written whole or not at all: grids and slide features."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..atomic import atomic_path
from ..errors import UserError


def save_arrays(path: str | Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Writes `arrays` (name → array) and `metadata` (anything JSON can hold) to `path`, atomically."""
    with atomic_path(path) as partial:
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()},
            partial,
            metadata={"meta": json.dumps(metadata)},
        )


def load_arrays(path: str | Path, names: list[str] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of `path` (all, or those in `names`) and its metadata.

    Raises UserError when the file is missing, truncated, or not one that `save_arrays` wrote.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})["meta"])
            arrays = {name: file.get_tensor(name) for name in (names or file.keys())}
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it and make it again") from error
    return arrays, metadata
