"""Where the time of embedding went, and what would change it."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..slides.reader import Slide


IDLE = 0.1  # share of the time that the encoder may wait for tiles before reading is what limits


@dataclass(frozen=True)
class Timing:
    """Seconds that were spent; reading and writing go on beside the encoder, so the sum may exceed what the clock says.

    Attributes:
        read: of threads waiting for the storage (or for a processor).
        decode: of processors making tiles of what was read.
        wait: of the encoder, for tiles.
        transfer: of copying tiles to the accelerator.
        forward: of the encoder at work.
        write: of writing features.
    """

    read: float = 0.0
    decode: float = 0.0
    wait: float = 0.0
    transfer: float = 0.0
    forward: float = 0.0
    write: float = 0.0

    def __add__(self, other: "Timing") -> "Timing":
        return Timing(*(mine + its for mine, its in zip(asdict(self).values(), asdict(other).values())))

    def share(self, share: float) -> "Timing":
        """The seconds of this share of the work."""
        return Timing(*(share * seconds for seconds in asdict(self).values()))

    def to_json(self) -> dict[str, float]:
        """The seconds by their names, to the millisecond."""
        return {name: round(seconds, 3) for name, seconds in asdict(self).items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in asdict(self).items())


def advice(timing: Timing, *, threads: int, cores: int, on_gpu: bool) -> str:
    """What limited the speed, and what to change, in one sentence.

    Args:
        threads: that read tiles.
        cores: that the process may use.
        on_gpu: whether the encoder was on one.
    """
    busy = timing.wait + timing.transfer + timing.forward
    idle = timing.wait / busy if busy else 0.0
    if idle > IDLE:
        says = f"limited by reading: {idle:.0%} of the time the encoder waited for tiles"
        if timing.read > timing.decode:
            return f"{says}, and readers for the storage; raise --threads ({threads}), or copy slides to a local disk"
        if threads < cores:
            return f"{says}; raise --threads ({threads} for {cores} cores)"
        return f"{says}, and all {cores} cores are in use; get more of them, or tile with --half-scale"
    if timing.transfer > timing.forward:
        return "limited by copying tiles to the accelerator: use smaller tiles, or fewer processes for each of them"
    if not on_gpu:
        return "limited by the encoder, on processors: use a GPU"
    return "limited by the encoder: try --precision bfloat16 and a larger --batch-size, or more GPUs"


class TimedSlide:
    """A slide that takes note of how long its tiles took; threads share it."""

    def __init__(self, slide: Slide):
        self.slide = slide
        self._spent: list[tuple[float, float]] = []  # appending is the one thing that threads may do without a lock

    def read_tiles(
        self, xy: np.ndarray, size: int, extent: tuple[float, float], out: Sequence[np.ndarray] | None = None
    ) -> tuple[Sequence[np.ndarray], np.ndarray]:
        """As `Slide.read_tiles`."""
        began, began_work = time.perf_counter(), time.thread_time()
        try:
            return self.slide.read_tiles(xy, size, extent, out)
        finally:
            self._spent.append((time.perf_counter() - began, time.thread_time() - began_work))

    @property
    def timing(self) -> Timing:
        """What reading has taken until now."""
        spent, worked = (sum(column) for column in zip(*self._spent, (0.0, 0.0)))
        return Timing(read=max(0.0, spent - worked), decode=worked)
