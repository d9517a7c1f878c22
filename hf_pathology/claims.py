"""Several processes, on one machine or many, share a list of things to do: each is done once, and none is lost.

Before a thing is done it is claimed by a lock that the operating system holds (`flock`), which ends with the process,
however that ends: a claim survives nothing and cannot stick. Whoever gets a claim looks first whether the thing was done
meanwhile. Between machines this needs a file system that carries locks (NFS 4, Lustre with `flock`, BeeGFS, GPFS).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from .atomic import naming_write_errors


Item = TypeVar("Item")
WAIT_SECONDS = 0.2  # between two looks at what other processes have claimed


class Claim:
    """The right to do one thing, until it is given back or this process ends."""

    def __init__(self, lock: FileLock):
        self._lock = lock

    def release(self) -> None:
        """Gives the claim back. Its file goes with it; who still waits for that file will find the thing done."""
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_) -> None:
        self.release()


def claim(folder: str | Path, key: str) -> Claim | None:
    """The claim to what `key` names in `folder`, or None when another process has it."""
    path = Path(folder) / ".claims" / f"{key}.lock"
    lock = FileLock(path, thread_local=False)
    with naming_write_errors(path):
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
                return Claim(lock)
            except Timeout:
                return None
            except FileNotFoundError:  # another process, done with everything, removed the folder in this moment
                continue


def claimed(items: Iterable[Item], folder: str | Path, key_of: Callable[[Item], str]) -> Iterator[tuple[Item, Claim]]:
    """All `items`, each with its claim, which the caller releases: first those that nobody else is doing.

    The others follow when their claims end; whoever gets one has to look whether the thing is done by now.
    """
    waiting = list(items)
    while waiting:
        postponed = []
        for item in waiting:
            own = claim(folder, key_of(item))
            if own is None:
                postponed.append(item)
            else:
                yield item, own
        if len(postponed) == len(waiting):
            time.sleep(WAIT_SECONDS)
        waiting = postponed
    remove_empty(Path(folder) / ".claims")


def remove_empty(folder: Path) -> None:
    """Removes `folder` and the folders in it, as far as they are empty."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            with suppress(OSError):
                path.rmdir()
    with suppress(OSError):
        folder.rmdir()
