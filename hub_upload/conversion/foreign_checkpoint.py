"""A published checkpoint, wherever it lies: a file of torch or safetensors, a folder of the Hub, an archive of either.

Nothing in it is trusted. What a file is, is told by its first bytes, not by its name; sizes are counted before anything is read;
what a folder names stays within the folder. Two things may be links: what the user names, and, in the Hub's cache, the
files of a snapshot, which lead to the blobs of the same repository.
"""

import json
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.conversion.foreign_archive import unpacked
from hf_pathology.hub_upload.conversion.foreign_pickle import read_torch_file, require_size


MAX_BYTES = 16 * 10**9
MAX_JSON_BYTES = 64 * 10**6
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what transformers calls them; in parts there is an index
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")


@dataclass(frozen=True)
class ForeignCheckpoint:
    """What was read.

    Attributes:
        content: nested dictionaries of tensors and plain values, or of objects that are only data.
        files: that it was read from.
        config: of transformers' `config.json`, where a folder has one.
    """

    content: dict[str, Any]
    files: tuple[Path, ...]
    config: dict[str, Any] | None = None


@contextmanager
def open_checkpoint(path: Path, max_bytes: int = MAX_BYTES) -> Iterator[ForeignCheckpoint]:
    """The checkpoint in the file, folder or archive `path`, whose tensors may be parts of it, mapped into memory.

    Raises UserError when it does not exist, is damaged, holds what is not read, or more than `max_bytes`.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: pass a checkpoint")
    if path.is_dir():
        yield read_folder(path, max_bytes)
    elif is_archive(path):
        with unpacked(path, max_bytes) as folder:
            try:
                inside = read_folder(single_checkpoint(folder, path), max_bytes)
            except UserError as error:  # the user knows nothing of the temporary folder
                raise UserError(str(error).replace(str(folder), str(path))) from error
            yield ForeignCheckpoint(inside.content, (path,), inside.config)
    else:
        yield ForeignCheckpoint(read_file(path, max_bytes), (path,))


def read_folder(folder: Path, max_bytes: int) -> ForeignCheckpoint:
    """The checkpoint in `folder`: transformers' files, in one part or more, or the one other file of weights in it."""
    if folder.is_file():
        return ForeignCheckpoint(read_file(folder, max_bytes), (folder,))
    config = folder / "config.json"
    config = read_json(member_of(folder, "config.json")) if config.is_file() else None
    for name in WEIGHTS:
        if (folder / name).is_file():
            files = (member_of(folder, name),)
        elif (folder / f"{name}.index.json").is_file():
            files = parts_of(folder, f"{name}.index.json")
        else:
            continue
        break
    else:
        files = (single_checkpoint(folder, folder),)
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}, which its index names: fetch it again")
    require_size(folder, sum(file.stat().st_size for file in files), max_bytes)
    content: dict[str, Any] = {}
    for file in files:
        part = read_file(file, max_bytes)
        if twice := content.keys() & part.keys():
            raise UserError(f"{folder} holds {min(twice)} in more than one of its files: fetch it again")
        content |= part
    return ForeignCheckpoint(content, files, config)


def read_file(path: Path, max_bytes: int) -> dict[str, Any]:
    """The dictionary in one file of torch or safetensors. Raises UserError when there is none that can be read."""
    require_size(path, path.stat().st_size, max_bytes)
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        content = read_torch_file(path, max_bytes)
    elif path.suffix == ".safetensors" or start[8:9] == b"{":
        try:
            content = load_file(path)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged, or was not copied whole: fetch it again") from error
    elif start == b"version h":
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself: fetch that with `git lfs pull`")
    else:
        raise UserError(f"{path} is no checkpoint: neither torch nor safetensors writes files that begin so")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds a {type(content).__name__}, not weights by their names: it cannot be converted")
    return content


def is_archive(path: Path) -> bool:
    """Whether the file `path` is an archive of files, and not torch's own zip."""
    try:
        if not zipfile.is_zipfile(path):
            return tarfile.is_tarfile(path)
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # `read_file` says that it is damaged
        return False


def single_checkpoint(folder: Path, named: Path) -> Path:
    """The folder of the Hub below `folder`, or its only file of weights; `named` is what a message calls it."""
    names = {*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS)}
    hub = sorted({file.parent for file in folder.rglob("*") if file.name in names})
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    found = hub or files
    if len(found) != 1:
        listed = ", ".join(str(each.relative_to(folder)) for each in found[:5]) or "none"
        raise UserError(f"{named} must hold one checkpoint, and holds {listed}: pass the one that you mean")
    return found[0] if hub else member_of(folder, str(found[0].relative_to(folder)))


def parts_of(folder: Path, index: str) -> tuple[Path, ...]:
    """The files that the `index` of a checkpoint in parts names."""
    content = read_json(member_of(folder, index))
    weights = content.get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise UserError(f"{folder / index} has no weight_map of names and files: fetch it again")
    return tuple(member_of(folder, name) for name in sorted(set(weights.values())))


def member_of(folder: Path, name: str) -> Path:
    """The file `name` in `folder`. Raises UserError when it, or where it leads as a link, lies elsewhere."""
    path = PurePosixPath(name.replace("\\", "/"))
    real, home = (folder / name).resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if path.is_absolute() or ".." in path.parts or not any(real.is_relative_to(place) for place in allowed):
        raise UserError(f"{folder} names {name!r}, which leads out of it: pass the file itself if you mean it")
    return folder / name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError when it is none."""
    require_size(path, path.stat().st_size, MAX_JSON_BYTES)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: fetch it again")
    return content
