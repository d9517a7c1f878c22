"""How fast is pretraining, beside the plain way (`plain_pretraining.py`)? Both in turn, in one run.

    python benchmarks/pretrain.py
    python benchmarks/pretrain.py --size vit-b --batch-size 128 --peak 989
    python benchmarks/pretrain.py --small --tiles TILES --measure step views pipeline parts
    python benchmarks/pretrain.py --methods dino ibot mae dinov2 --measure step memory

The views are the published ones, 2 of 224 and 8 (DINO) or 10 (iBOT) of 96 pixels from tiles of 256; with --small those of
the learning experiment, 2 of 96 and 4 of 48 pixels from tiles of 224, for a ViT of width 192 and depth 6. TILES is a folder
of images; without it tiles are drawn. What is measured:

- step: from views on the device to moved weights;
- views: from decoded tiles to views, first without and then with the colour changes that ours leave to the device;
- pipeline: from images on disk to moved weights, ours in the training loop of the recipes;
- parts: where the time of that goes, and with --profile, of each operator of a step;
- memory: what a step takes at its peak; on a CPU each way in a process of its own.

On a CPU a second is a second of processor time of one thread. On a GPU steps are timed by its events, the pipeline, with
--workers, by the clock. Numbers are medians over rounds in which all ways run one after the other; ratios are those
within a round, with the least and the most of them. FLOPs are those of matrix products and convolutions, where a
multiplication with an addition is two. The device's peak is that of one large matrix product in the same precision, unless
--peak states it.
"""

import argparse
import math
import multiprocessing
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from plain_pretraining import PlainTiles
from pretrain_ways import (
    METHODS,
    SIZES,
    OurStep,
    Setup,
    Way,
    computed,
    formula_flops,
    our_model,
    plain_step,
    published,
    small,
    ways,
)
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode

from hf_pathology.recipes.inputs import views_to_inputs
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.tiles.folder import read_tile
from hf_pathology.tiles.folder_blocks import FolderBlocks, find_images
from hf_pathology.tiles.loader import TileLoader
from hf_pathology.training.loop import TrainingLoop
from hf_pathology.training.options import TrainingOptions
from hf_pathology.training.start import keep_freed_memory


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VIEWED = 32  # tiles whose views are made in a round
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """How to measure; see `--help`."""

    device: torch.device
    precisions: list[str]
    plain_precisions: list[str]
    rounds: int
    steps: int
    workers: int
    peak: float | None = None
    profile: bool = False

    def ways(self, setup: Setup) -> list[Way]:
        return ways(setup, self.precisions, self.plain_precisions, self.device)

    def clock(self) -> float:
        """Seconds of processor time, with a GPU those that pass."""
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()


# Tiles.


def draw_tiles(folder: Path, size: int, count: int = 128) -> None:
    """Writes JPEGs of drawn tissue, as many as there is room for, up to `count`."""
    edge = math.ceil((3 * count) ** 0.5)  # tiles along the slide, of which two fifths are tissue
    slide, tissue = draw_slide(0, "glandular", edge * size)
    covered = cv2.resize(tissue.mask.astype(np.float32), (edge, edge), interpolation=cv2.INTER_AREA) > 0.5
    for number, (top, left) in enumerate(np.argwhere(covered)[:count] * size):
        Image.fromarray(slide[top : top + size, left : left + size]).save(folder / f"{number:04d}.jpg", quality=90)


def read_rows(folder: Path, setup: Setup, count: int) -> list[dict[str, Any]]:
    """The first `count` tiles, over again where there are fewer, as the stream hands them to `MultiCrop`."""
    size = (setup.tile_size, setup.tile_size)
    tiles = [read_tile(folder / path) for path in find_images(folder)[:count]]
    tiles = [cv2.resize(tile, size, interpolation=cv2.INTER_AREA) for tile in tiles]
    places = [{"slide": "tiles", "xy": np.array([number, 0]), "epoch": 0} for number in range(count)]
    return [{"tile": tiles[number % len(tiles)], **place} for number, place in enumerate(places)]


def make_inputs(setup: Setup, rows: list[dict[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of views of all rows, on the device."""
    make = setup.multi_crop()
    return views_to_inputs(setup.views, device)(default_collate([make(row) for row in rows]))


# Clocks.


def seconds_of(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds of one `run`, of `times` in a row: by events of a GPU, or of processor time."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(times):
            run()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1000 / times
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def in_turn(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each says in each round; they take turns at being first, and a round before the first is not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            value = runs[name]()
            if turn:
                found[name].append(value)
    return found


def times(slow: list[float], fast: list[float]) -> str:
    """How many times less `fast` takes: the median of the rounds, the least and the most."""
    ratios = sorted(one / other for one, other in zip(slow, fast))
    return f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def peak_flops(precision: str, options: Options) -> float:
    """FLOP/s of one large matrix product, the best of several."""
    if options.peak:
        return options.peak * 1e12
    edge = 8192 if options.device.type == "cuda" else 2048
    left, right = (torch.randn(edge, edge, device=options.device).to(DTYPES[precision]) for _ in range(2))
    return 2 * edge**3 / min(seconds_of(lambda: left @ right, 2, options.device) for _ in range(6))


def counted_flops(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(list(columns)))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(end="", flush=True)


# The measures.


def measure_step(setup: Setup, folder: Path, options: Options) -> None:
    """Prints images a second, FLOPs, and what share of the device's peak they are."""
    all_ways, batch = options.ways(setup), setup.batch_size
    peaks = {each: peak_flops(each, options) for each in sorted({way.precision for way in all_ways})}
    inputs = make_inputs(setup, read_rows(folder, setup, setup.batch_size), options.device)
    hidden = inputs["hidden"].sum().item() / batch if "hidden" in inputs else 0.0
    runs = {way.name: way.make(inputs) for way in all_ways}
    flops = {way.name: counted_flops(runs[way.name]) / batch for way in all_ways if not way.compiled}
    found = in_turn(
        {name: partial(seconds_of, run, options.steps, options.device) for name, run in runs.items()}, options.rounds
    )
    plain = [way.name for way in all_ways if way.is_plain]
    rows = []
    for way in all_ways:
        each = median(found[way.name]) / batch
        formula = formula_flops(setup, hidden, every_patch=way.is_plain)
        done = flops.get(way.name, formula)  # a compiled layer counts nothing
        rate = [f"{1 / each:,.1f}", f"{each * 1000:.2f}", f"{done / 1e9:.2f}", f"{formula / 1e9:.2f}"]
        share = [f"{done / each / 1e12:.3f}", f"{done / each / peaks[way.precision]:.0%}"]
        rows.append([way.name, *rate, *share, *(times(found[name], found[way.name]) for name in plain)])
    columns = [
        "way",
        "img/s",
        "ms/img",
        "GFLOP/img",
        "by formula",
        "TFLOP/s",
        "of peak",
        *(f"times {name}" for name in plain),
    ]
    peak = ", ".join(f"{precision} {value / 1e12:.2f} TFLOP/s" for precision, value in peaks.items())
    print_table(f"{setup}: step; peak: {peak}", columns, rows)
    for name in runs if options.profile else []:
        with profile(
            activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (options.device.type == "cuda")]
        ) as spent:
            runs[name]()
        print(f"\n{setup}: {name}\n" + spent.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))


def measure_views(setup: Setup, folder: Path, options: Options) -> None:
    """Prints milliseconds of processor time from decoded tiles to a batch of views."""
    rows = read_rows(folder, setup, VIEWED)
    images = [Image.fromarray(row["tile"]) for row in rows]
    plain, ours, to_inputs = setup.plain_views(), setup.multi_crop(), views_to_inputs(setup.views, CPU)
    runs = {
        "plain: all by Pillow": lambda: default_collate([plain(image) for image in images]),
        "ours, of a worker: crops in uint8": lambda: default_collate([ours(row) for row in rows]),
        "ours, colour changes and all": lambda: to_inputs(default_collate([ours(row) for row in rows])),
    }
    found = in_turn({name: partial(seconds_of, run, 1, CPU) for name, run in runs.items()}, options.rounds)
    reference = next(iter(found.values()))
    table = []
    for name, seconds in found.items():
        each = median(seconds) / len(rows)
        table.append([name, f"{each * 1000:.2f}", f"{1 / each:,.0f}", times(reference, seconds)])
    views = setup.views
    kinds = f"{views.global_views} x {views.global_size} + {views.local_views} x {views.local_size} px"
    print_table(
        f"{setup.method}: views, {kinds} of tiles of {setup.tile_size} px",
        ["way", "ms/img", "img/s", "times plain"],
        table,
    )


class Enough(Exception):
    """Ends a training loop from within its loader."""


class TimedLoader:
    """Hands on the batches of a loader, and ends the training loop after some steps."""

    def __init__(self, loader: TileLoader, options: Options):
        self.loader, self.options = loader, options
        self.seconds = 0.0  # of a step with the making of a batch, in the last run of the loop

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(self.loader):
            if number == 1:  # the loop may ask for a batch before it takes the step of the one before
                began = self.options.clock()
            if number == 1 + self.options.steps:
                self.seconds = (self.options.clock() - began) / self.options.steps
                raise Enough
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self.loader.load_state_dict(states)


def our_pipeline(setup: Setup, folder: Path, out: Path, options: Options) -> Callable[[], float]:
    """Seconds of a step in the training loop of the recipes, from images on disk."""
    on_cpu, precision = options.device.type == "cpu", {"bf16": "bf16", "fp32": "no"}[options.precisions[0]]
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
    source = FolderBlocks(folder, in_memory=True)
    loader = TimedLoader(
        TileLoader(source, setup.multi_crop(), batch_size=setup.batch_size, workers=options.workers), options
    )
    model = computed(our_model(setup, accelerator.device), compile=not on_cpu)
    to_inputs = views_to_inputs(setup.views, accelerator.device)
    training = TrainingOptions(steps=10**6, batch_size=setup.batch_size, checkpoint_every=10**6, cpu=on_cpu)
    loop = TrainingLoop(model, loader, to_inputs, training, accelerator, out, config={})

    def run() -> float:
        with suppress(Enough):
            loop.run()
        return loader.seconds

    return run


def plain_pipeline(setup: Setup, folder: Path, precision: str, options: Options) -> Callable[[], float]:
    """Seconds of a step of the plain way, from images on disk."""
    step, loader = plain_step(setup, precision, options.device), plain_loader(setup, folder, options)

    def run() -> float:
        for number, batch in enumerate(loader):
            if number == 0:
                began = options.clock()
            if number == options.steps:
                return (options.clock() - began) / options.steps
            step(*([each.to(options.device, non_blocking=True) for each in kind] for kind in batch))
        raise AssertionError("there is always another batch")

    return run


def plain_loader(setup: Setup, folder: Path, options: Options) -> DataLoader:
    """Endless batches of Pillow's views of tiles in random order."""
    tiles = PlainTiles([folder / path for path in find_images(folder)], setup.plain_views())
    chance = torch.Generator().manual_seed(0)
    order = (int(torch.randint(len(tiles), (), generator=chance)) for _ in iter(int, 1))
    pinned = options.device.type == "cuda"
    return DataLoader(tiles, setup.batch_size, sampler=order, num_workers=options.workers, pin_memory=pinned)


def measure_pipeline(setup: Setup, folder: Path, options: Options) -> None:
    """Prints images a second with everything counted, and how many the step alone would make on a GPU."""
    runs = {}
    if METHODS[setup.method][2]:
        for precision in options.plain_precisions:
            runs[f"plain, {precision}"] = plain_pipeline(setup, folder, precision, options)
    with tempfile.TemporaryDirectory() as out:
        ours = f"ours, {options.precisions[0]}"
        runs[ours] = our_pipeline(setup, folder, Path(out), options)
        found = in_turn(runs, options.rounds)
    table = []
    for name, seconds in found.items():
        each = median(seconds) / setup.batch_size
        ratios = [times(found[other], seconds) for other in runs if other != ours]
        table.append([name, f"{1 / each:,.1f}", f"{each * 1000:.2f}", *ratios])
    columns = ["way", "img/s", "ms/img", *(f"times {name}" for name in runs if name != ours)]
    print_table(f"{setup}: pipeline, {options.workers} workers", columns, table)


class Parts:
    """Adds up the seconds of the parts of a run, by the names that they are given."""

    def __init__(self, options: Options):
        self.options = options
        self.seconds: dict[str, float] = defaultdict(float)
        self._began: dict[str, float] = {}

    def timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._begin(name)
            result = call(*args, **kwargs)
            self._end(name)
            return result

        return run

    def of_methods(self, owner: Any, **names: str) -> None:
        """Times these methods of `owner` from now on."""
        for method, name in names.items():
            setattr(owner, method, self.timed(getattr(owner, method), name))

    def of_modules(self, first: nn.Module, last: nn.Module, name: str) -> None:
        """Times from the call of `first` to the end of `last`, which may be the same."""
        first.register_forward_pre_hook(lambda *_: self._begin(name))
        last.register_forward_hook(lambda *_: self._end(name))

    def _begin(self, name: str) -> None:
        self._began.setdefault(name, self._now())

    def _end(self, name: str) -> None:
        self.seconds[name] += self._now() - self._began.pop(name)

    def _now(self) -> float:
        if self.options.device.type == "cuda":
            torch.cuda.synchronize()
        return self.options.clock()


VIEWS, BATCH, COLOURS, TEACHER, STUDENT, HEADS = "views", "batch", "colour changes", "teacher", "student", "heads"
FORWARD = "forward"
OF_STEP = {
    "forward": FORWARD,
    "backward": "backward",
    "clip_gradients": "norms, clipping",
    "optimize": "optimizer",
    "follow": "centres, EMA",
}


def plain_parts(setup: Setup, folder: Path, precision: str, options: Options) -> tuple[Parts, Callable[[], None]]:
    """The clock of its parts, and a step of the plain way with the making of its batch."""
    parts, step = Parts(options), plain_step(setup, precision, options.device)
    loader = plain_loader(setup, folder, options)
    loader.dataset.views = parts.timed(loader.dataset.views, VIEWS)
    for trunk, name in ((step.method.teacher, TEACHER), (step.method.student, STUDENT)):
        parts.of_modules(trunk.patch_embed, trunk.norm, name)
    for head in (step.method.teacher_head, step.method.student_head):
        parts.of_modules(head, head, HEADS)
    parts.of_methods(step, **OF_STEP)
    batches = iter(loader)
    draw = parts.timed(lambda: next(batches), BATCH)
    return parts, lambda: step(*([each.to(options.device) for each in kind] for kind in draw()))


def our_parts(setup: Setup, folder: Path, options: Options) -> tuple[Parts, Callable[[], None]]:
    """The same of ours."""
    parts, model = Parts(options), our_model(setup, options.device)
    step, source = OurStep(model, options.precisions[0]), FolderBlocks(folder, in_memory=True)
    loader = TileLoader(source, parts.timed(setup.multi_crop(), VIEWS), batch_size=setup.batch_size, workers=0)
    to_inputs = parts.timed(views_to_inputs(setup.views, options.device), COLOURS)
    for who, name in (("teacher", TEACHER), ("student", STUDENT)):
        if trunk := getattr(model, who, None):
            parts.of_modules(trunk.embeddings, trunk.layernorm, name)
    for name, child in model.named_children():
        for part in child.children() if name.endswith("_head") else []:
            parts.of_modules(part, part, HEADS)
    parts.of_methods(step, **OF_STEP)
    batches = iter(loader)
    draw = parts.timed(lambda: next(batches), BATCH)
    return parts, lambda: step(**to_inputs(draw()))


def measure_parts(setup: Setup, folder: Path, options: Options) -> None:
    """Prints milliseconds of each part of the pipeline, without workers; the medians of the rounds."""
    both = {}
    for precision in options.plain_precisions if METHODS[setup.method][2] else []:
        both[f"plain, {precision}"] = plain_parts(setup, folder, precision, options)
    both[f"ours, {options.precisions[0]}"] = our_parts(setup, folder, options)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in both}
    for turn in range(options.rounds + 1):
        for name, (parts, run) in both.items():
            parts.seconds.clear()
            run()
            spent = dict(parts.seconds)
            spent["decoding, batching"] = spent.pop(BATCH) - spent[VIEWS]
            inside = sum(spent.get(part, 0.0) for part in (TEACHER, STUDENT, HEADS))
            spent["losses and the rest"] = spent.pop(FORWARD) - inside
            if turn:
                rounds[name].append({**spent, "sum": sum(spent.values())})
    order = ["decoding, batching", VIEWS, COLOURS, TEACHER, STUDENT, HEADS, "losses and the rest"]
    table = []
    for part in [*order, *list(OF_STEP.values())[1:], "sum"]:
        each = [median(spent.get(part, 0.0) for spent in rounds[name]) / setup.batch_size for name in both]
        table.append([part, *(f"{1000 * seconds:.2f}" for seconds in each)])
    print_table(f"{setup}: parts, ms/img", ["part", *both], table)


def peak_memory(setup: Setup, folder: Path, name: str, options: Options) -> int:
    """Bytes that two steps of the way of that `name` take at their peak, with weights, gradients and the optimizer's."""
    way = next(way for way in options.ways(setup) if way.name == name)
    inputs = make_inputs(setup, read_rows(folder, setup, setup.batch_size), options.device)
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        torch.set_num_threads(1)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before, peak = resident("VmRSS"), partial(resident, "VmHWM")
    run = way.make(inputs)
    for _ in range(2):
        run()
    return peak() - before


def resident(field: str) -> int:
    """Bytes of memory of this process, by the name of a field of proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure_memory(setup: Setup, folder: Path, options: Options) -> None:
    """Prints what each way takes for a step."""
    table = []
    for way in options.ways(setup):
        if options.device.type == "cuda":
            taken = peak_memory(setup, folder, way.name, options)
        else:
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                taken = fresh.apply(peak_memory, (setup, folder, way.name, options))
        table.append([way.name, f"{taken / 1e6:,.0f}", f"{taken / 1e6 / setup.batch_size:,.1f}"])
    print_table(f"{setup}: memory", ["way", "MB", "MB/img"], table)


MEASURES: dict[str, Callable[[Setup, Path, Options], None]] = {
    "step": measure_step,
    "views": measure_views,
    "pipeline": measure_pipeline,
    "parts": measure_parts,
    "memory": measure_memory,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["dino", "ibot"], choices=METHODS)
    parser.add_argument("--size", choices=SIZES, help="vit-s, with --small small")
    parser.add_argument("--small", action="store_true", help="the set-up of the learning experiment")
    parser.add_argument("--batch-size", type=int, help="8, with --small 64, on a GPU 128")
    parser.add_argument("--tiles", type=Path, help="a folder of images")
    parser.add_argument("--measure", nargs="+", default=["step", "views"], choices=MEASURES)
    parser.add_argument("--precisions", nargs="+", default=["bf16"], choices=DTYPES, help="of ours")
    parser.add_argument("--plain-precisions", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of each way in a round")
    parser.add_argument("--workers", type=int, default=0, help="of the pipeline")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, where it is known")
    parser.add_argument("--profile", action="store_true", help="print the operators of a step too")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    asked = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not asked.cpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        keep_freed_memory()  # as `start` does; the plain way gains too, for they share the process
    numbers = (asked.precisions, asked.plain_precisions, asked.rounds, asked.steps, asked.workers, asked.peak)
    options = Options(device, *numbers, profile=asked.profile)
    for method in asked.methods:
        if asked.small:
            setup = small(method, asked.size or "small", asked.batch_size or 64)
        else:
            setup = published(method, asked.size or "vit-s", asked.batch_size or (128 if device.type == "cuda" else 8))
        with tempfile.TemporaryDirectory() as drawn:
            if asked.tiles is None:
                draw_tiles(Path(drawn), setup.tile_size)
            for name in asked.measure:
                MEASURES[name](setup, asked.tiles or Path(drawn), options)


if __name__ == "__main__":
    main()
