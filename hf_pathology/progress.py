"""Progress of a long command: a live bar in a terminal, now and then a plain line elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


Item = TypeVar("Item")
PLAIN_SECONDS = 5.0  # between two plain lines


class ProgressBar:
    """Counts `total` things being done; used as a context manager.

    Args:
        title: what is being done.
        total: how many things there are.
        unit: their name in the plural, for the rate.
    """

    def __init__(self, title: str, total: int, unit: str = "slides"):
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self._units = 0
        self._started = self._spoken = time.monotonic()
        console = Console(stderr=True)
        self._bar = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )

    def __enter__(self) -> "ProgressBar":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, note="")
        return self

    def __exit__(self, kind, *_) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self.total:
            self._speak("")

    def advance(self, note: str = "", units: int = 0) -> None:
        """One more thing is done, which held `units` of the unit the rate is given in; `note` is shown beside it."""
        self.done += 1
        self._units += units
        if self._units:
            rate = self._units / max(1e-9, time.monotonic() - self._started)
            note = f"{rate:,.0f} {self.unit}/s {note}"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)
        elif time.monotonic() - self._spoken > PLAIN_SECONDS and self.done < self.total:
            self._speak(note)

    def _speak(self, note: str) -> None:
        self._spoken = time.monotonic()
        seconds = self._spoken - self._started
        left = f", {seconds / self.done * (self.total - self.done):.0f} s left" if 0 < self.done < self.total else ""
        print(
            f"{self.title}: {self.done}/{self.total} in {seconds:.0f} s{left} {note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )


def with_progress(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """The `items` themselves, while a progress bar counts them."""
    with ProgressBar(title, total) as progress:
        for item in items:
            yield item
            progress.advance()
