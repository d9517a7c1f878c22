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
import multiprocessing
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import cv2
import torch
from PIL import Image
from pretrain_clocks import (
    DTYPES,
    Options,
    counted_flops,
    draw_tiles,
    in_turn,
    make_inputs,
    peak_flops,
    print_table,
    read_rows,
    seconds_of,
    times,
)
from pretrain_pipeline import (
    BATCH,
    COLOURS,
    FORWARD,
    HEADS,
    OF_STEP,
    STUDENT,
    TEACHER,
    VIEWS,
    our_parts,
    our_pipeline,
    plain_parts,
    plain_pipeline,
)
from pretrain_ways import METHODS, SIZES, Setup, formula_flops, published, small
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import default_collate

from hf_pathology.recipes.inputs import views_to_inputs
from hf_pathology.training.start import keep_freed_memory


VIEWED = 32  # tiles whose views are made in a round
CPU = torch.device("cpu")


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
