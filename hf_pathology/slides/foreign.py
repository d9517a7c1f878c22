"""Arrays in files of other programs, read without trusting what the files claim: nothing in them runs or reaches outside."""

import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..atomic import atomic_path
from ..errors import UserError


LARGEST = 16 << 30  # bytes that the arrays of one slide may take: four million tiles of 1024 numbers
SWELLING = (
    1100  # deflate makes nothing smaller than by this factor; a file that claims more was not written by a program
)
READ_FAILURES = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError, EOFError)
FORMAT_FAILURES = (zipfile.BadZipFile, zlib.error, struct.error, pickle.PickleError, tarfile.TarError)


@contextmanager
def naming_read_errors(path: str | Path, kind: str) -> Iterator[None]:
    """Turns every failure to read `path` within the block into a UserError of one line."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    try:
        yield
    except UserError:
        raise
    except (*READ_FAILURES, *FORMAT_FAILURES) as error:
        cause = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read as {kind} ({cause}): it is damaged or something else") from error


def require_plausible(path: str | Path, claimed: int) -> None:
    """Raises UserError when arrays of `claimed` bytes cannot lie in the file `path`, or would fill the memory."""
    if claimed > min(LARGEST, SWELLING * Path(path).stat().st_size):
        raise UserError(f"{path} claims to hold {claimed} bytes of numbers, which it cannot: it is damaged")


def require_plausible_zip(path: str | Path) -> None:
    """The same for what a zip archive would unfold to."""
    with zipfile.ZipFile(path) as archive:
        require_plausible(path, sum(member.file_size for member in archive.infolist()))


def read_h5(path: str | Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The datasets of an HDF5 file that are among `names`, and the attributes of the file and of these datasets.

    Raises UserError when it is missing or truncated, or when a dataset lies in another file.
    """
    arrays, attributes = {}, {}
    with naming_read_errors(path, "HDF5"), h5py.File(path, "r") as file:
        attributes.update(file.attrs)
        for name in [name for name in names if name in file]:
            dataset = file[name]
            own = isinstance(file.get(name, getlink=True), h5py.HardLink) and isinstance(dataset, h5py.Dataset)
            if not own or dataset.external or dataset.is_virtual:
                raise UserError(f"{path} keeps '{name}' in another file: copy it into this one")
            require_numbers(path, name, dataset.dtype)
            require_plausible(path, dataset.size * dataset.dtype.itemsize)
            arrays[name] = dataset[()]
            attributes.update(dataset.attrs)
    return arrays, attributes


def write_h5(path: str | Path, arrays: dict[str, np.ndarray], attributes: dict[str, dict[str, Any]]) -> None:
    """Writes `arrays` as contiguous datasets, with the attributes of each; those under "" belong to the file.

    Chunks of one row, which CLAM and TRIDENT write, are much slower to read.
    """
    with atomic_path(path) as partial, h5py.File(partial, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
        for name, values in attributes.items():
            (file[name] if name else file).attrs.update(values)


def read_npy(path: str | Path) -> np.ndarray:
    """The array of an .npy file. Raises UserError when it is missing, truncated, or holds Python objects."""
    with naming_read_errors(path, "npy"):
        array = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    require_numbers(path, "the array", array.dtype)
    return array


def write_npy(path: str | Path, array: np.ndarray) -> None:
    """Writes one array, whole or not at all."""
    with atomic_path(path) as partial, open(partial, "wb") as file:
        np.save(file, array, allow_pickle=False)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name. Raises UserError when it is missing, damaged, or holds Python objects."""
    with naming_read_errors(path, "npz"):
        require_plausible_zip(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    for name, array in arrays.items():
        require_numbers(path, name, array.dtype)
    return arrays


def write_npz(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays by name, compressed, whole or not at all."""
    with atomic_path(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_json(path: str | Path) -> dict[str, Any]:
    """The object of a JSON file. Raises UserError when it is missing or no object."""
    with naming_read_errors(path, "JSON"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: it is damaged or something else")
    return content


def require_numbers(path: str | Path, name: str, dtype: np.dtype) -> None:
    """Raises UserError unless arrays of `dtype` are integers or floats, or records of them."""
    kinds = [dtype] if dtype.names is None else [dtype[field] for field in dtype.names]
    if not all(kind.kind in "iuf" for kind in kinds):
        raise UserError(f"{path}: {name} is of type {dtype}, not numbers")


def positive(path: str | Path, values: dict[str, Any], name: str) -> float:
    """What `values` says under `name`. Raises UserError unless it is one positive number."""
    if name not in values:
        raise UserError(f"{path} does not say its {name}: it is not in the format that was expected")
    try:
        number = float(np.asarray(values[name]).item())
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 < number < float("inf"):
        raise UserError(f"{path} says that its {name} is {values[name]!r}: it must be a positive number")
    return number
