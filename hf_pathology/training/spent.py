"""What a run has cost so far: seconds since its last record, seconds of waiting for tiles, CPU seconds in all."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Spent:
    """The clocks of one process of a run.

    CPU seconds are those of this process and of its children, living (the workers of the loader) or finished, since this
    object was made, and what the run had spent before it went on. Living children are seen where there is `/proc`, that
    is on Linux; elsewhere they count once they have finished.

    Args:
        cpu_seconds: spent before, as a checkpoint has recorded it.
    """

    def __init__(self, cpu_seconds: float = 0.0):
        self._zero = _own_seconds() + _seconds_of_living_children() - cpu_seconds
        self.waited = 0.0  # seconds since the last lap
        self._began = time.monotonic()

    @property
    def cpu_seconds(self) -> float:
        return _own_seconds() + _seconds_of_living_children() - self._zero

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as waiting."""
        asked = time.monotonic()
        yield
        self.waited += time.monotonic() - asked

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leaves what this process computes in the block out of the CPU seconds: it is no training."""
        before = _own_seconds()
        try:
            yield
        finally:
            self._zero += _own_seconds() - before

    def lap(self) -> dict[str, float]:
        """`seconds` and `waited_seconds` since the last lap."""
        now = time.monotonic()
        lap = {"seconds": now - self._began, "waited_seconds": self.waited}
        self._began, self.waited = now, 0.0
        return lap


def _own_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _seconds_of_living_children() -> float:
    """CPU seconds of the worker processes that live, and of their finished children."""
    total = 0
    for child in multiprocessing.active_children():
        try:
            # utime, stime, cutime, cstime are fields 14 to 17 of proc(5); the name before them may hold spaces.
            fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended, or there is no /proc
        total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK") if total else 0.0
