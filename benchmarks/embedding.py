"""How much of an encoder's own speed is left when its tiles come from a slide? Both in turn, in one run.

    python benchmarks/slides.py SLIDES --only aperio-256-420
    python benchmarks/embedding.py SLIDES
    python benchmarks/embedding.py SLIDES --dialect generic-512-420 --tiles 20000 --batch-size 256 --precision bfloat16

The encoder is a ViT-S/16 with random weights, on a GPU if there is one. In each round it first encodes uint8 tiles that lie
in memory, then `embed_cohort` makes the features of as many tiles of a slide and writes them, then it encodes those in
memory once more; the file is in the page cache. Prints the medians over the rounds of the tiles a second of both and of
their ratio within a round; and, which a machine that others use disturbs less, how much of the time from slide to features
the encoder was at work. Where the encoder is the limit, at least 90 % are to be left.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from slides import slide_path
from transformers import ViTConfig, ViTModel

from hf_pathology.commands.embed import available_cores
from hf_pathology.features.embed import embed_cohort
from hf_pathology.features.encoder import PRECISIONS, Encoder
from hf_pathology.features.presets import IMAGENET_MEAN, IMAGENET_STD
from hf_pathology.features.resume import EmbedOptions
from hf_pathology.features.timing import Timing, advice
from hf_pathology.slides.cohort import CohortSlide
from hf_pathology.slides.grid import TileGrid, tile_grid
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.tissue import Tissue


SIZE, MPP = 224, 0.5
VIT_S = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)


def random_encoder(precision: str) -> Encoder:
    """A ViT-S/16 whose numbers mean nothing, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ViTModel(VIT_S, add_pooling_layer=False).eval().to(device)
    return Encoder(model, "vit-s", "random", "cls", SIZE, MPP, IMAGENET_MEAN, IMAGENET_STD, precision=precision)


def whole_grid(path: Path, tiles: int) -> TileGrid:
    """The first `tiles` tiles of the slide, edge to edge."""
    with Slide(path) as slide:
        tissue = Tissue(np.ones((8, 8), bool), tuple(edge / 8 for edge in slide.dimensions))
        grid = tile_grid(slide, tissue, key=path.name, size=SIZE, mpp=MPP)
    return grid.select(np.arange(min(tiles, len(grid))))


def encode_in_memory(encoder: Encoder, tiles: torch.Tensor, count: int) -> float:
    """Tiles a second of the encoder alone, given the same batch of uint8 `tiles` in memory until `count` are done."""
    began = time.perf_counter()
    for start in range(0, count, len(tiles)):
        encoder(tiles[: count - start])
    return count / (time.perf_counter() - began)


def embed_slide(encoder: Encoder, path: Path, grid: TileGrid, options: EmbedOptions) -> tuple[float, float, Timing]:
    """Tiles a second from the closed slide to the written features, the encoder's share of the time, and all parts."""
    pairs = [(CohortSlide(path.name, path, path.name), grid)]
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        ((_, result),) = embed_cohort(pairs, encoder, out, options)
        seconds = time.perf_counter() - began
    return len(grid) / seconds, result.timing.forward / seconds, result.timing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", type=Path)
    parser.add_argument("--dialect", default="aperio-256-420")
    parser.add_argument("--tiles", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() if torch.cuda.is_available() else 1)
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    asked = parser.parse_args()
    torch.manual_seed(0)
    encoder, path = random_encoder(asked.precision), slide_path(asked.slides, asked.dialect)
    grid, options = whole_grid(path, asked.tiles), EmbedOptions(asked.batch_size, asked.threads)
    tiles, _ = grid.open(path).read_tiles(grid.xy[: asked.batch_size], SIZE, grid.extent)
    in_memory = torch.from_numpy(np.asarray(tiles))
    encoder(in_memory)  # the first batch is slower than the others
    rounds = []
    for _ in range(asked.rounds):
        before = encode_in_memory(encoder, in_memory, len(grid))
        embedded = embed_slide(encoder, path, grid, options)
        after = encode_in_memory(encoder, in_memory, len(grid))
        rounds.append((2 / (1 / before + 1 / after), *embedded))
    alone, embedded, at_work = (median(each[i] for each in rounds) for i in (0, 1, 2))
    left = median(each[1] / each[0] for each in rounds)
    timing = rounds[-1][3]
    on_gpu = encoder.device.type == "cuda"
    print(
        f"{asked.dialect}, {len(grid)} tiles, {encoder.device.type}, {asked.precision}, {asked.threads} reading threads"
    )
    print("| encoder alone, tiles/s | slide to features, tiles/s | left | encoder at work |\n|---|---|---|---|")
    print(f"| {alone:,.1f} | {embedded:,.1f} | {left:.1%} | {at_work:.1%} |")
    print(f"last round: {timing}")
    print(advice(timing, threads=asked.threads, cores=available_cores(), on_gpu=on_gpu))


if __name__ == "__main__":
    main()
