"""Files that torch has written, read without trust: tensors and plain values, and of classes only what the original codes store.

Such a file is a pickle, a program that whoever made it wrote. torch's own restricted reader runs it (`weights_only=True`), and
here it knows a list of its own and no other: what other libraries have allowed in this process does not count.
"""

import re
import struct
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from hf_pathology.errors import UserError


NUMBER_CODES = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
NUMBER_CODES |= {"f2": "e", "f4": "f", "f8": "d"}  # numpy's names of the kinds of numbers, and struct's


class NumpyDtype:
    """What stands for a `numpy.dtype` while a pickle is read: its name and its order of bytes."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


def numpy_scalar(dtype: NumpyDtype, data: bytes) -> Any:
    """The number that a numpy scalar was, without numpy."""
    if not isinstance(dtype, NumpyDtype) or dtype.code not in NUMBER_CODES:
        raise UnpicklingError("a numpy scalar that is no number")
    return struct.unpack(dtype.order + NUMBER_CODES[dtype.code], data)[0]


ALLOWED = [  # beside torch's tensors and Python's plain values: what stands for it here, and its name in the pickle
    (Namespace, "argparse.Namespace"),  # `args` of DINO, iBOT, MAE; `hparams` of SimCLR
    (PurePosixPath, "pathlib.PosixPath"),  # in SimCLR's `hparams`
    (PurePosixPath, "pathlib._local.PosixPath"),
    (PureWindowsPath, "pathlib.WindowsPath"),
    (PureWindowsPath, "pathlib._local.WindowsPath"),
    (NumpyDtype, "numpy.dtype"),  # of scalars that schedules leave behind
    (numpy_scalar, "numpy.core.multiarray.scalar"),
    (numpy_scalar, "numpy._core.multiarray.scalar"),
]


def read_torch_file(path: Path, max_bytes: int) -> Any:
    """What `torch.save` wrote to `path`, in its present format (mapped, not copied, into memory) or the one before.

    Raises UserError when it is damaged, holds what is not on the list, or more than `max_bytes`. Nothing in it is executed.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        check_members(path, max_bytes)
    try:
        with only_allowed_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about files like these
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged or hostile pickle can make its reader raise anything
        raise reason_of(path, error) from error


@contextmanager
def only_allowed_globals() -> Iterator[None]:
    """Within the block torch's restricted reader knows `ALLOWED`, and nothing that was added to it elsewhere."""
    before = get_safe_globals()
    clear_safe_globals()
    try:
        add_safe_globals(ALLOWED)
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def check_members(path: Path, max_bytes: int) -> None:
    """Raises UserError when the zip `path` is damaged, or would give more than it holds: torch never compresses."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged, or was not copied whole: fetch it again") from error
    declared = sum(member.file_size for member in members)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or declared > path.stat().st_size:
        raise UserError(
            f"{path} declares {declared / 1e9:.3g} GB in a file of {path.stat().st_size / 1e9:.3g}, which torch never "
            "writes: it is not read"
        )
    require_size(path, declared, max_bytes)


def require_size(path: Path, size: int, max_bytes: int) -> None:
    """Raises UserError when `size`, the bytes that `path` holds, is more than `max_bytes`."""
    if size > max_bytes:
        raise UserError(
            f"{path} holds {size / 1e9:.3g} GB, and {max_bytes / 1e9:.3g} are read at most: pass --max-gb if it is what "
            "you expect"
        )


def reason_of(path: Path, error: Exception) -> UserError:
    """The one line that says why `path` is not read."""
    if isinstance(error, UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
        return UserError(
            f"{path} holds {found[1]}, which is neither a tensor nor a plain value, and is not read: what a foreign file "
            "asks for is never run; save its weights alone where you trust it, and convert those"
        )
    if "TorchScript" in str(error):
        return UserError(f"{path} is a TorchScript program, which is never run: convert the weights it was made of")
    if isinstance(error, UnpicklingError) and "EOF" not in str(error):
        return UserError(
            f"{path} is not pickled as `torch.save` does, and is not read: save its weights alone where you trust it, "
            "and convert those"
        )
    return UserError(f"{path} is damaged, or was not copied whole: fetch it again")
