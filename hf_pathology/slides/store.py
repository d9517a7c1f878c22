"""Arrays with their metadata in one safetensors file, written whole or not at all, and checked when read.

The layout is that of https://github.com/huggingface/safetensors: eight bytes with the length of the header, the header
(JSON: type, shape and place of every array), the bytes of the arrays. Any reader of safetensors opens the files. They
are mapped here by hand because the library copies, and because every number of a damaged header has to be checked.

The header's `__metadata__` holds, as texts: `meta`, the metadata as JSON; `arrays_xxh3_128`, a checksum of the bytes of
each array as JSON; `header_xxh3_128`, a checksum of the header itself with zeros in the place of this one. A file with
`meta` alone comes from before the checksums and is taken as it is.
"""

import ctypes
import json
import math
import mmap
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from ..atomic import atomic_path
from ..errors import UserError


DTYPES = {"BOOL": "|b1", "U8": "|u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "F16": "<f2", "F32": "<f4"}
DTYPES |= {"F64": "<f8", "I8": "|i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 64  # bytes: where the arrays start
LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
NO_CHECKSUM = "0" * 32


def save_arrays(path: str | Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Writes `arrays` (name → array) and `metadata` (anything JSON can hold) to `path`, atomically."""
    arrays = {name: np.asarray(array, array.dtype.newbyteorder("<"), order="C") for name, array in arrays.items()}
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))  # so that each one is aligned
    header = header_of(arrays, metadata)
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for array in arrays.values():
            file.write(array.data)


def header_of(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> bytes:
    """The header of a file of these arrays, one after the other, padded so that the first of them is aligned."""
    checksums = {name: xxh3_128_hexdigest(array) for name, array in arrays.items()}
    texts = {"meta": json.dumps(metadata), "arrays_xxh3_128": json.dumps(checksums)}
    content: dict[str, Any] = {"__metadata__": {"header_xxh3_128": NO_CHECKSUM, **texts}}
    start = 0
    for name, array in arrays.items():
        offsets = [start, start + array.nbytes]
        content[name] = {"dtype": CODES[array.dtype.str], "shape": array.shape, "data_offsets": offsets}
        start += array.nbytes
    header = json.dumps(content).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    return header.replace(NO_CHECKSUM.encode(), xxh3_128_hexdigest(header).encode(), 1)


def load_arrays(
    path: str | Path, names: Iterable[str] | None = None, *, mapped: bool = False, verify: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of `path` (all, or those in `names`) and its metadata.

    Args:
        mapped: arrays that are read-only views of the file instead of copies in memory. They take no memory and no
            file descriptor, are three times as fast to read whole, and show what the file was when it was opened even
            after it has been written anew, because `save_arrays` puts another file in its place. But a program that
            cuts the file short where it lies (`cp` over it, `rsync --inplace`) ends this process by SIGBUS: hence
            copies by default.
        verify: compares the bytes of these arrays with their checksums; without it a mapped file is not read at all,
            but for its header, which is always verified.

    Raises UserError when the file is missing, truncated, changed by a single bit, or not one that `save_arrays` wrote.
    """
    try:
        memory = map_file(path)
        header = read_header(memory)
        arrays = {name: header.view(memory, name) for name in (header.entries if names is None else names)}
        if not mapped:
            arrays = {name: array.copy() for name, array in arrays.items()}
        if verify:
            header.verify(arrays)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): delete it and make it again") from error
    return arrays, header.metadata


class Mapping:
    """The bytes of a file as read-only memory, given back when the last array that shows them is gone.

    Python's `mmap` keeps a file descriptor for each mapping (unless `trackfd=False`, from Python 3.13 on), and a
    process may have no more than some thousand of these.
    """

    def __init__(self, descriptor: int, size: int):
        address = libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        weakref.finalize(self, libc().munmap, address, size).atexit = False  # arrays may live longer than this module
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address, True)}


@cache
def libc() -> ctypes.CDLL:
    """The C library, with what it has to know of `mmap` and `munmap`."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


def map_file(path: str | Path) -> np.ndarray:
    """The bytes of `path`, read-only uint8 (size,); nothing is read and no file descriptor stays open."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return np.asarray(Mapping(file.fileno(), size)) if size else np.empty(0, np.uint8)


@dataclass(frozen=True)
class Header:
    """What a file says about its arrays, checked against the size of the file.

    Attributes:
        entries: type, shape, first byte and the byte after the last, in the file, of each array.
        metadata: what `save_arrays` was given.
        checksums: of each array; empty in a file from before the checksums.
    """

    entries: dict[str, tuple[np.dtype, tuple[int, ...], int, int]]
    metadata: dict[str, Any]
    checksums: dict[str, str]

    def view(self, memory: np.ndarray, name: str) -> np.ndarray:
        """The array `name` within the bytes of the file. Raises ValueError when there is none."""
        if name not in self.entries:
            raise ValueError(f"it has no array {name!r}, but {', '.join(map(repr, self.entries))}")
        dtype, shape, start, stop = self.entries[name]
        return memory[start:stop].view(dtype).reshape(shape)

    def verify(self, arrays: dict[str, np.ndarray]) -> None:
        """Raises ValueError when the bytes of an array are not those that were written."""
        for name, array in arrays.items():
            if self.checksums and xxh3_128_hexdigest(array) != self.checksums[name]:
                raise ValueError(f"the bytes of {name!r} do not match their checksum")


def read_header(memory: np.ndarray) -> Header:
    """The header of the file with these bytes. Raises ValueError when it is damaged or does not fit the file."""
    length = int.from_bytes(memory[:8].tobytes(), "little")
    if len(memory) < 8 or length > min(len(memory) - 8, LONGEST_HEADER):
        raise ValueError("it is truncated, or no safetensors file")
    header = memory[8 : 8 + length].tobytes()
    try:
        content = json.loads(header)
        texts = content.pop("__metadata__")
        checksums = verified_checksums(header, texts)
        entries = checked_entries(content, 8 + length, len(memory))
        metadata = dict(json.loads(texts["meta"]))
        if checksums and checksums.keys() != entries.keys():
            raise ValueError("its checksums are not those of its arrays")
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError("its header is damaged, or another program wrote it") from error
    return Header(entries, metadata, checksums)


def verified_checksums(header: bytes, texts: dict[str, str]) -> dict[str, str]:
    """The checksums of the arrays, {} in a file from before them.

    Raises ValueError when the header does not match its own.
    """
    if texts.keys() == {"meta"}:
        return {}
    if texts.keys() != {"meta", "arrays_xxh3_128", "header_xxh3_128"}:
        raise ValueError("its metadata are not what was written")
    as_hashed = header.replace(texts["header_xxh3_128"].encode(), NO_CHECKSUM.encode(), 1)
    if xxh3_128_hexdigest(as_hashed) != texts["header_xxh3_128"]:
        raise ValueError("its header does not match its checksum")
    return json.loads(texts["arrays_xxh3_128"])


def checked_entries(
    content: dict[str, Any], start: int, size: int
) -> dict[str, tuple[np.dtype, tuple[int, ...], int, int]]:
    """Type, shape, first byte and the byte after the last of each array; the first starts at the byte `start`.

    Raises ValueError unless the arrays lie one after the other, without gap or overlap, up to the `size` of the file.
    """
    entries, end = {}, start
    for name, entry in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, offsets = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        if len(shape) > 8 or not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *offsets)):
            raise ValueError(f"its array {name!r} has no possible shape or place")
        first, last = (start + offset for offset in offsets)
        if first != end or last != first + dtype.itemsize * math.prod(shape) or last > size:
            raise ValueError(f"its array {name!r} does not fit the file")
        entries[name], end = (dtype, shape, first, last), last
    if end != size:
        raise ValueError(f"it has {size} bytes and its header speaks of {end}")
    return entries
