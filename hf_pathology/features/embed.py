"""Embeds the tiles of a cohort as one stream: batches stay full, and readers and encoder busy, from slide to slide.

Processes that write to one folder share its slides: each is claimed before it is read (`claims.py`), and whoever gets a
claim looks first whether the features are there by now. While slides of its own are on their way a process waits for no
other one: what others have claimed is looked at again when the rest is done.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from itertools import chain
from math import isqrt
from pathlib import Path

import numpy as np

from ..claims import WAIT_SECONDS, Claim, claim, remove_empty
from ..errors import SlideError, UserError
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from ..slides.staging import StagedSlides
from ..slides.stored import SlideLayout
from ..tiles.batches import TileBatch, TileJob, read_batches
from ..tiles.blocks import blocks_of
from .encoder import Encoder
from .forward import EncodedBatch, TileEncoder, encode_batches
from .resume import EmbeddedSlide, EmbedOptions, find_embedded
from .store import SlideFeatures, features_path
from .timing import TimedSlide, Timing


BLOCK_PIXELS = 2560  # edge of what is read together, in stored pixels
WAITING_TO_BE_WRITTEN = 2  # slides; further ones wait, so that memory does not fill when the disk is slow

SlideGrid = tuple[CohortSlide, TileGrid]


def check_resolution(encoder: Encoder, mpp: float) -> None:
    """Raises UserError when tiles at `mpp` are not what the encoder was trained on."""
    known = [] if encoder.mpp is None else [encoder.mpp, *encoder.other_mpp]
    if known and not any(abs(mpp / each - 1) <= 0.01 for each in known):
        raise UserError(
            f"{encoder.name} was trained at {', '.join(map(str, known))} mpp and the tiles are at {mpp}: "
            f"tile again with --mpp {encoder.mpp}, or pass --other-mpp to embed them all the same"
        )


def own_share_first(pairs: Sequence[SlideGrid], rank: int, processes: int) -> list[SlideGrid]:
    """All slides, those first that process `rank` is to begin with: shares of about as many tiles, largest slides first.

    Those of the others follow, from their ends on, for when a share is done sooner than expected.
    """
    if processes == 1:
        return list(pairs)
    shares: list[list[SlideGrid]] = [[] for _ in range(processes)]
    tiles = np.zeros(processes, int)
    for pair in sorted(pairs, key=lambda pair: -len(pair[1])):
        least = int(tiles.argmin())
        shares[least].append(pair)
        tiles[least] += len(pair[1])
    others = [*shares[rank + 1 :], *shares[:rank]]
    return shares[rank] + [pair for share in others for pair in reversed(share)]


def embed_cohort(
    pairs: Sequence[SlideGrid], encoder: TileEncoder, out: str | Path, options: EmbedOptions | None = None
) -> Iterator[tuple[CohortSlide, EmbeddedSlide | SlideError]]:
    """Each slide with what became of it, when its features are written, or with the error that kept it from having them.

    Slides that are embedded already come first, the others as they are done, also those that other processes do. What
    ends the whole run (a full disk, an encoder that fails) is raised; what is finished stays, and no claim remains.
    """
    options = options or EmbedOptions()
    sizes = {grid.size for _, grid in pairs}
    if len(sizes) > 1:
        raise UserError(f"the grids differ in tile size ({sorted(sizes)} px): tile again with one of them")
    waiting = []
    for slide, grid in pairs:
        found = find_embedded(slide, grid, encoder, out, options)
        if found is None:
            waiting.append((slide, grid))
        else:
            yield slide, found
    with nullcontext() if options.stage is None else StagedSlides(options.stage) as staged:
        while waiting:
            one = EmbeddingPass(waiting, encoder, Path(out), options, staged)
            yield from one
            if len(one.postponed) == len(waiting):
                time.sleep(WAIT_SECONDS)
            waiting = one.postponed
    remove_empty(Path(out) / ".claims")


class SlideOnItsWay:
    """A claimed slide, from its first tile read to its features written."""

    def __init__(self, slide: CohortSlide, grid: TileGrid, own: Claim):
        self.slide, self.grid, self.claim = slide, grid, own
        self.reader = TimedSlide(grid.open(slide.path))
        self.features: np.ndarray | None = None  # (N, D), when the first have come
        self.valid = np.zeros(len(grid), bool)
        self.to_come = len(grid)
        self.timing = Timing()

    def jobs(self, path: Path, batch_size: int) -> Iterator[TileJob]:
        """Its tiles in blocks of neighbours, read from `path`. Raises SlideError when that cannot be opened."""
        self.reader = TimedSlide(self.grid.open(path))
        opened, extent = self.reader.slide, self.grid.extent
        level = opened.level_for((extent[0] / self.grid.size, extent[1] / self.grid.size))
        step = max(edge / own for edge, own in zip(self.grid.stride, level.downsample))  # stored pixels
        edge = min(
            round(BLOCK_PIXELS / step), isqrt(batch_size)
        )  # a block that is cut in two is decoded in part twice
        for rows in blocks_of(self.grid, max(1, edge)):
            yield TileJob(self.reader, self.grid.xy[rows], extent, rows, self)

    def take(self, rows: np.ndarray, features: np.ndarray, valid: np.ndarray, timing: Timing) -> None:
        """Takes the features (n, D) of some of its tiles; those of unreadable ones become NaN."""
        if self.features is None:
            self.features = np.empty((len(self.grid), features.shape[1]), np.float32)
        self.features[rows] = features
        self.features[rows[~valid]] = np.nan
        self.valid[rows] = valid
        self.to_come -= len(rows)
        self.timing += timing

    def check(self, max_invalid: float) -> None:
        """Raises SlideError when more of its tiles cannot be read than allowed."""
        unreadable = len(self.grid) - self.to_come - int(self.valid.sum())
        if unreadable > max_invalid * len(self.grid):
            at_least = "at least " if self.to_come else ""
            raise SlideError(
                f"{self.slide.path} has {at_least}{unreadable} of {len(self.grid)} tiles that cannot be read: "
                "the file is damaged, get it again"
            )

    def save(self, encoder: TileEncoder, path: Path, dtype: str) -> EmbeddedSlide:
        """Writes the features. Raises SlideError when they are no numbers, or the slide is not what it was."""
        self.reader.slide.close()
        began = time.perf_counter()
        if not unchanged(self.slide.path, self.reader.slide.layout):
            raise SlideError(f"{self.slide.path} is gone or has changed while it was read: run the command again")
        if not np.isfinite(self.features[self.valid]).all():
            raise SlideError(
                f"{self.slide.path} has tiles of which {encoder.name} makes no finite numbers: use --precision float32"
            )
        bag = SlideFeatures.of_grid(
            self.grid,
            self.features,
            self.valid,
            encoder=encoder.name,
            revision=encoder.revision,
            pooling=encoder.pooling,
        )
        bag.save(path, dtype)
        timing = self.timing + self.reader.timing + Timing(write=time.perf_counter() - began)
        return EmbeddedSlide(len(bag), int((~self.valid).sum()), found=False, timing=timing)


def unchanged(path: Path, layout: SlideLayout) -> bool:
    """Whether the file at `path` is the one with this layout."""
    try:
        return layout.matches(path.stat())
    except OSError:
        return False


class EmbeddingPass:
    """Once through a list of slides: those that no other process has claimed, read and encoded as one stream.

    Attributes:
        postponed: the slides that others have claimed, when it is through.
    """

    def __init__(
        self,
        pairs: Sequence[SlideGrid],
        encoder: TileEncoder,
        out: Path,
        options: EmbedOptions,
        staged: StagedSlides | None = None,
    ):
        self.pairs, self.encoder, self.out, self.options = pairs, encoder, out, options
        self._staged = staged
        self.postponed: list[SlideGrid] = []
        self._on_their_way: set[SlideOnItsWay] = set()
        self._writing: deque[tuple[SlideOnItsWay, Future[EmbeddedSlide]]] = deque()
        self._ended: deque[tuple[CohortSlide, EmbeddedSlide | SlideError]] = deque()

    def __iter__(self) -> Iterator[tuple[CohortSlide, EmbeddedSlide | SlideError]]:
        """The slides as they end."""
        jobs = self._jobs()
        writer = ThreadPoolExecutor(1, thread_name_prefix="features")
        try:
            first = next(jobs, None)
            if first is not None:  # else all are claimed, and no memory is taken for batches
                with closing(self._batches(chain([first], jobs))) as batches:
                    for encoded in encode_batches(batches, self.encoder):
                        self._take(encoded, writer)
                        yield from self._results(WAITING_TO_BE_WRITTEN)
            yield from self._results(0)
        finally:
            writer.shutdown(cancel_futures=True)
            for each in self._on_their_way:
                each.claim.release()

    def _batches(self, jobs: Iterable[TileJob]) -> Iterator[TileBatch]:
        return read_batches(
            jobs,
            self.pairs[0][1].size,
            batch_size=self.options.batch_size,
            threads=self.options.threads,
            ahead=max(2, self.options.threads),  # a batch is often one block, and a block is read by one thread
            pinned=isinstance(self.encoder, Encoder) and self.encoder.device.type == "cuda",
        )

    def _jobs(self) -> Iterator[TileJob]:
        """The tiles of one slide after the other; a slide is claimed (copied) and opened when its turn comes."""
        claimed = self._claimed()
        for each, path in self._staged.ahead(claimed) if self._staged else claimed:
            try:
                for job in each.jobs(path, self.options.batch_size):
                    if each not in self._on_their_way:  # it has failed by now
                        break
                    yield job
            except SlideError as error:
                self._end(each, error)

    def _claimed(self) -> Iterator[tuple[SlideOnItsWay, Path]]:
        """The slides that are to be embedded here, and where they lie."""
        for slide, grid in self.pairs:
            own = claim(self.out, slide.key)
            if own is None:
                self.postponed.append((slide, grid))
                continue
            each = SlideOnItsWay(slide, grid, own)
            self._on_their_way.add(each)
            found = find_embedded(slide, grid, self.encoder, self.out, self.options)
            if found is None:
                yield each, slide.path
            else:
                self._end(each, found)

    def _take(self, encoded: EncodedBatch, writer: ThreadPoolExecutor) -> None:
        """Hands the features of a batch to the slides they belong to, and those that are complete to the writer."""
        start, batch = 0, encoded.batch
        for place, job in enumerate(batch.jobs):
            part = slice(start, start + len(job.xy))
            start, each = part.stop, job.source
            if each not in self._on_their_way:
                continue
            try:
                if place in batch.errors:
                    raise batch.errors[place]
                share = encoded.timing.share(len(job.xy) / len(batch.valid))
                each.take(job.rows, encoded.features[part], batch.valid[part], share)
                each.check(self.options.max_invalid)
            except SlideError as error:
                self._end(each, error)
                continue
            if each.to_come == 0:
                path = features_path(self.out, each.slide.key)
                self._writing.append((each, writer.submit(each.save, self.encoder, path, self.options.dtype)))

    def _results(self, still_writing: int) -> Iterator[tuple[CohortSlide, EmbeddedSlide | SlideError]]:
        """What has ended, after waiting until no more than `still_writing` slides are to be written."""
        while self._writing and (len(self._writing) > still_writing or self._writing[0][1].done()):
            each, future = self._writing.popleft()
            try:
                self._end(each, future.result())
            except SlideError as error:
                self._end(each, error)
        while self._ended:
            yield self._ended.popleft()

    def _end(self, each: SlideOnItsWay, result: EmbeddedSlide | SlideError) -> None:
        self._on_their_way.discard(each)
        each.claim.release()
        if self._staged:
            self._staged.release(each.slide.path)
        self._ended.append((each.slide, result))
