"""Where shards lie: on disk, on the Hub, or in any file system that fsspec knows, all asked in the same three ways."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
from huggingface_hub import HfFileSystem

from ..errors import UserError
from .shard_formats import FORMATS


HUB = "hf://"
EXACTLY = {"cache_type": "none"}  # an option of fsspec: fetch what is read and nothing ahead of it


class ShardFiles(Protocol):
    """Finds and opens files; every file system of fsspec does."""

    def find(self, path: str) -> list[str]:
        """All files in `path` and below, or the one that `path` is."""
        ...

    def info(self, path: str) -> dict[str, Any]:
        """`size` in bytes and, where it is known, `mtime`. Raises FileNotFoundError."""
        ...

    def open(self, path: str, mode: str = "rb", **options: Any) -> BinaryIO: ...


class LocalFiles:
    """Files on disk, without fsspec: what pyarrow reads by itself, without a place that processes would share."""

    def find(self, path: str) -> list[str]:
        found = Path(path)
        paths = [found] if found.is_file() else [each for each in found.rglob("*") if each.is_file()]
        return [str(each) for each in paths]

    def info(self, path: str) -> dict[str, Any]:
        status = Path(path).stat()
        return {"size": status.st_size, "mtime": status.st_mtime}

    def open(self, path: str, mode: str = "rb", **options: Any) -> BinaryIO:
        return pa.OSFile(path, mode)


def find_shards(
    shards: str | Path | Sequence[str | Path], files: ShardFiles | None = None
) -> tuple[ShardFiles, list[str]]:
    """The file system of the shards, and their paths in it, sorted.

    Args:
        shards: a folder that is searched with all its sub-folders, a file, several of these, or hf://datasets/ORG/NAME
            with or without a folder in it.
        files: where they are; by default the Hub for hf://, else the disk.

    Raises UserError when there is none.
    """
    places = [str(place) for place in ([shards] if isinstance(shards, str | Path) else shards)]
    if files is None:
        hub = [place.startswith(HUB) for place in places]
        if any(hub) and not all(hub):
            raise UserError(f"{places} lie partly on the Hub: copy them to one place")
        files = HfFileSystem() if any(hub) else LocalFiles()
    found: set[str] = set()
    for place in places:
        try:
            below = files.find(place.removeprefix(HUB))
        except OSError as error:
            raise UserError(f"{place} cannot be read: {error}") from error
        names = [path for path in below if re.search(r"(^|/)[^./][^/]*$", path)]  # hidden files are of programs
        own = [path for path in names if path.endswith(tuple(FORMATS.values()))]
        if not own:
            raise UserError(f"{place} holds no shard: looked for {' and '.join(FORMATS.values())} in it and below")
        found.update(own)
    return files, sorted(found)
