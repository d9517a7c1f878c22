"""How fast are the features of one slide written, read whole and read by rows? Our file beside what the field writes.

    python benchmarks/feature_store.py --tiles 15000 --width 1536

Prints the medians of several runs in one process, in an order that rotates. Files are written and flushed to the disk, and
read from the page cache. A read ends when every byte of it was added up, so that mapping a file is not credited for
nothing; the last columns are how many times faster than h5 with one-row chunks, which CLAM and its successors write.
`SlideFeatures.load` maps and verifies a whole bag, and maps without verifying when asked for rows, unless told otherwise.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from hf_pathology.features.store import SlideFeatures


@dataclass(frozen=True)
class Format:
    """A way to keep features: how they are written, read whole, and read by sorted rows."""

    name: str
    write: Callable[[Path, SlideFeatures], None]
    read: Callable[[Path], np.ndarray]
    read_rows: Callable[[Path, np.ndarray], np.ndarray]


def h5(name: str, rows_per_chunk: int | None) -> Format:
    """An h5 file whose chunks hold so many rows each, or that is contiguous when None."""

    def write(path: Path, bag: SlideFeatures) -> None:
        layout = {"chunks": (rows_per_chunk, bag.features.shape[1])} if rows_per_chunk else {}
        with h5py.File(path, "w") as file:
            file.create_dataset("features", data=bag.features, **layout)
            file.create_dataset("coords", data=bag.xy)

    def read(path: Path, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        with h5py.File(path) as file:
            return file["features"][rows]

    return Format(name, write, read, read)


def ours(name: str, dtype: str, **options: bool) -> Format:
    """Our file, its features as `dtype`, read with these options of `SlideFeatures.load`."""

    def read(path: Path, rows: np.ndarray | None = None) -> np.ndarray:
        return SlideFeatures.load(path, rows, **options).features

    return Format(name, lambda path, bag: bag.save(path, dtype), read, read)


def formats() -> list[Format]:
    """Everything that is compared; the first is what the others are compared with."""

    def read_pt(path: Path) -> np.ndarray:
        return torch.load(path, weights_only=True).numpy()

    def read_safetensors(path: Path) -> np.ndarray:
        return load_file(path)["features"]

    return [
        h5("h5, chunks of 1 row", 1),
        h5("h5, chunks of 256 rows", 256),
        h5("h5, contiguous", None),
        Format(
            "torch .pt",
            lambda path, bag: torch.save(torch.from_numpy(bag.features), path),
            read_pt,
            lambda path, rows: read_pt(path)[rows],
        ),
        Format(
            "safetensors library",
            lambda path, bag: save_file({"features": bag.features, "xy": bag.xy}, path),
            read_safetensors,
            lambda path, rows: read_safetensors(path)[rows],
        ),
        ours("ours, in memory, verified", "float32", mapped=False, verify=True),
        ours("ours, mapped, verified", "float32", mapped=True, verify=True),
        ours("ours, mapped, not verified", "float32", mapped=True, verify=False),
        ours("ours, float16, mapped, verified", "float16", mapped=True, verify=True),
    ]


def made_up_bag(tiles: int, width: int) -> SlideFeatures:
    """A bag of random features float32 (tiles, width)."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((tiles, width), dtype=np.float32)
    xy, valid = rng.integers(0, 100_000, (tiles, 2)), np.ones(tiles, bool)
    return SlideFeatures("a", "e", "r", "cls", 224, 0.5, (448.0, 448.0), (100_000, 100_000), features, xy, valid)


def write_flushed(write: Callable[[Path, SlideFeatures], None], path: Path, bag: SlideFeatures) -> None:
    """Writes a file in the place of the one before, and waits until it lies on the disk."""
    path.unlink(missing_ok=True)
    write(path, bag)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read_every_byte(read: Callable[..., np.ndarray], *arguments: object) -> None:
    """Adds up all that `read` returns, as 64-bit numbers: equally fast for every dtype."""
    read(*arguments).reshape(-1).view(np.uint64).sum()


def seconds(action: Callable[..., None], *arguments: object) -> float:
    """How long `action(*arguments)` takes."""
    started = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=15_000)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    bag = made_up_bag(options.tiles, options.width)
    rows = np.sort(np.random.default_rng(1).choice(options.tiles, min(options.rows, options.tiles), replace=False))
    compared = formats()
    taken: dict[str, list[list[float]]] = {each.name: [] for each in compared}
    with tempfile.TemporaryDirectory() as folder:
        paths = {each.name: Path(folder) / str(number) for number, each in enumerate(compared)}
        for run in range(options.runs):
            for each in compared[run % len(compared) :] + compared[: run % len(compared)]:
                path = paths[each.name]
                written = seconds(write_flushed, each.write, path, bag)
                whole = seconds(read_every_byte, each.read, path)
                some = seconds(read_every_byte, each.read_rows, path, rows)
                taken[each.name].append([written, whole, some])
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    medians = {name: np.median(times, axis=0) for name, times in taken.items()}
    baseline = medians[compared[0].name]
    print(f"{options.tiles} x {options.width} features, {options.runs} runs\n")
    print(f"| file | write, s | whole, ms | {len(rows)} rows, ms | bytes | whole, faster | rows, faster |")
    print("|---|---|---|---|---|---|---|")
    for name, (written, whole, some) in medians.items():
        faster = " | ".join(f"{ratio:.1f}" for ratio in (baseline / medians[name])[1:])
        print(f"| {name} | {written:.2f} | {whole * 1e3:.1f} | {some * 1e3:.1f} | {sizes[name]:,} | {faster} |")


if __name__ == "__main__":
    main()
