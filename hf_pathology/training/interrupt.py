"""Ctrl-C and SIGTERM ask a run to stop after its current step, so that it can save itself."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself. `signal` is the number of the signal."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal = signal_number


class StopRequest:
    """The signal that asked to stop, 0 while none has."""

    signal = 0


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; a second one acts as usual."""
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame) -> None:
        request.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
