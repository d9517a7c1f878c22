"""Copies of slides on a fast local disk, made while the slides before them are being read, and removed when done.

Slides often lie on slow shared storage, where each small read waits. A folder of copies is somebody's disk, so nothing is
ever removed from it but a file that this process has put there: copies lie in a folder of this process's own, whose marker
says so, and only that folder is ever cleaned.
"""

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ..atomic import naming_write_errors
from ..errors import UserError
from .reader import ONE_FILE


Item = TypeVar("Item")
MARKER = ".hf_pathology-staged-slides"
AHEAD = 1  # slides that are copied while one is read
SPARE = 1 << 30  # bytes that are left free on the disk


class StagedSlides:
    """Copies slides into a folder ahead of their use; a context manager that removes its copies.

    Args:
        folder: on a fast disk; made if it is not there. What others have in it stays untouched.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder) / f"hf_pathology-{os.uname().nodename}-{os.getpid()}"
        self._copies: dict[Path, Path] = {}
        self._numbers = itertools.count()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="staging")

    def __enter__(self) -> "StagedSlides":
        with naming_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MARKER).touch()
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)
        for path in list(self._copies):
            self.release(path)
        with suppress(OSError):
            (self.folder / MARKER).unlink()
            self.folder.rmdir()  # only when nothing else lies in it

    def ahead(self, items: Iterable[tuple[Item, Path]]) -> Iterator[tuple[Item, Path]]:
        """The items, each with the path of its slide's copy, which is made while the items before it are in use.

        A slide of several files, one that cannot be copied and one for which there is no room keep their own path.
        """
        waiting: list[tuple[Item, Path, Future]] = []
        for item, path in items:
            waiting.append((item, path, self._pool.submit(self._copy, path)))
            if len(waiting) > AHEAD:
                done, _, copied = waiting.pop(0)
                yield done, copied.result()
        for done, _, copied in waiting:
            yield done, copied.result()

    def release(self, path: Path) -> None:
        """Removes the copy of the slide at `path`, if there is one."""
        copy = self._copies.pop(path, None)
        if copy is not None:
            copy.unlink(missing_ok=True)

    def _copy(self, path: Path) -> Path:
        """The path of a copy with the same size and time, or `path` itself when no copy can be had."""
        if path.suffix.lower() not in ONE_FILE:
            return path
        copy = self.folder / f"{next(self._numbers)}{path.suffix}"
        try:
            if path.stat().st_size + SPARE > shutil.disk_usage(self.folder).free:
                return path
            shutil.copy2(path, copy)  # with its time, by which a grid recognises its slide
        except OSError:
            copy.unlink(missing_ok=True)
            return path
        self._copies[path] = copy
        return copy


def remove_abandoned(folder: str | Path) -> None:
    """Removes the copies that processes of this machine left in `folder` when they were killed.

    Raises UserError when `folder` is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file: pass a folder for the copies of slides")
    for own in folder.glob(f"hf_pathology-{os.uname().nodename}-*"):
        process = own.name.rpartition("-")[2]
        if not (own / MARKER).is_file() or (process.isdigit() and Path("/proc", process).exists()):
            continue
        for copy in own.iterdir():
            if copy.name == MARKER or (copy.stem.isdigit() and copy.suffix.lower() in ONE_FILE):
                copy.unlink(missing_ok=True)
        with suppress(OSError):
            own.rmdir()
