"""How fast is the hierarchy? Regions through both levels, grids to the second level's training, clusters of slides.

    python benchmarks/hierarchy.py
    python benchmarks/hierarchy.py --measure clusters --slides 1000 --regions 60000

- regions: a region of 4096 px through ViT-S/16 and ViT-4K-XS, as the original does it (mini-batches of 256 tiles in float32
  with explicit attention, one region at a time) and as `HiptModel` does it in bfloat16; both in turn, and the cosine of their
  features;
- grids: the loader of the second level beside its training step;
- clusters: k-means within all slides, and the matching of all pairs of slides.

Seconds are of the processor, of as many threads as --threads says; medians over rounds. On a GPU regions are timed by the clock.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from pretrain_clocks import in_turn, print_table, times
from torch.nn.functional import cosine_similarity
from transformers import ViTConfig

from hf_pathology.features.grid_crops import GridCropOptions, GridCrops
from hf_pathology.features.region_blocks import RegionBlocks
from hf_pathology.features.region_clusters import cluster_slides, match_slides, unit
from hf_pathology.features.store import SlideFeatures, features_path
from hf_pathology.modeling.configuration_dino import DinoConfig
from hf_pathology.modeling.configuration_hipt import HiptConfig, HiptRegionConfig
from hf_pathology.modeling.modeling_dino import DinoForPreTraining
from hf_pathology.modeling.modeling_hipt import HiptModel
from hf_pathology.recipes.region_data import crops_to_inputs
from hf_pathology.tiles.loader import TileLoader
from hf_pathology.training.start import keep_freed_memory


EDGE, REGION = 4096, 16


def seconds(run: Callable[[], object], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def hipt(device: torch.device) -> HiptModel:
    """HIPT's sizes with random weights, large enough for features to differ from tile to tile."""
    torch.manual_seed(0)
    tile = ViTConfig(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=256,
        layer_norm_eps=1e-6,
        initializer_range=0.04,
    )
    return HiptModel(HiptConfig(tile, HiptRegionConfig(grid_size=REGION, initializer_range=0.04))).eval().to(device)


@torch.inference_mode()
def measure_regions(rounds: int, device: torch.device) -> None:
    """Prints seconds of a region in both ways, and how alike their features are."""
    model = hipt(device)
    region = torch.randn(1, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(0)).to(device)
    found = {}

    def original() -> None:
        model.set_attn_implementation("eager")
        tiles = region.unfold(2, 256, 256).unfold(3, 256, 256).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        grid = torch.cat([model.tile_encoder(part).last_hidden_state[:, 0] for part in tiles.split(256)])  # (256, 384)
        grid = grid.T.reshape(1, 384, REGION, REGION)
        found["original"] = grid, model.region_encoder(grid).pooler_output

    def ours() -> None:
        model.set_attn_implementation("sdpa" if device.type == "cuda" else "eager")
        model.config.tile_batch_size = 256 if device.type == "cuda" else 16
        with torch.autocast(device.type, torch.bfloat16):
            output = model(region)
        found["ours"] = output.tile_features, output.pooler_output

    spent = in_turn({"original": lambda: seconds(original, device), "ours": lambda: seconds(ours, device)}, rounds)
    alike = [float(cosine_similarity(one.float(), other.float(), dim=1).min()) for one, other in zip(*found.values())]
    rows = [["as the original, float32", f"{median(spent['original']):.2f}", "1"]]
    rows += [["here, bfloat16", f"{median(spent['ours']):.2f}", times(spent["original"], spent["ours"])]]
    print_table(f"a region of {EDGE} px, {device}", ["way", "s/region", "times the original"], rows)
    print(f"\nleast cosine of the tiles' features {alike[0]:.5f}, of the region's {alike[1]:.5f}")


def write_store(folder: Path, slides: int, regions: int, width: int) -> None:
    """Random features of `regions` regions of `slides` slides."""
    rng = np.random.default_rng(0)
    each = regions // slides
    for slide in range(slides):
        features = rng.standard_normal((each * REGION**2, width), dtype=np.float32).astype(np.float16)
        xy = np.stack(np.meshgrid(np.arange(each) * 256, np.arange(REGION**2) * 256, indexing="ij"), -1).reshape(-1, 2)
        bag = SlideFeatures(
            slide=f"{slide}",
            encoder="random",
            revision="0",
            pooling="cls",
            size=256,
            mpp=0.5,
            extent=(256.0, 256.0),
            slide_size=(10**6, 10**6),
            features=features,
            xy=xy,
            valid=np.ones(len(xy), bool),
            region=REGION,
        )
        bag.save(features_path(folder, bag.slide))


def measure_grids(rounds: int, device: torch.device, batch: int = 64) -> None:
    """Prints regions a second of the loader of the second level, and of its training step."""
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), slides=8, regions=512, width=384)
        regions = RegionBlocks(folder)
        loader = TileLoader(regions, GridCrops(GridCropOptions(), 0), batch_size=batch, window=128, workers=0)
        batches, to_inputs = iter(loader), crops_to_inputs(device)
        model = DinoForPreTraining(DinoConfig(HiptRegionConfig())).train().to(device)
        model.suit(device)
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.after_step(0, 100)

        inputs = to_inputs(next(batches))
        spent = in_turn(
            {"loader": lambda: seconds(lambda: next(batches), device), "step": lambda: seconds(step, device)}, rounds
        )
    rows = [[name, f"{batch / median(each):,.0f}"] for name, each in spent.items()]
    print_table(
        f"grids, {device}: the loader is {times(spent['step'], spent['loader'])} times as fast",
        ["", "regions/s"],
        rows,
    )


def measure_clusters(slides: int, regions: int, width: int = 256, clusters: int = 4) -> None:
    """Prints seconds of the clock for all slides' clusters, and for the matching of all pairs."""
    rng = np.random.default_rng(0)
    features = unit(rng.standard_normal((regions, width)).astype(np.float32))
    slide_of = np.sort(rng.integers(0, slides, regions))
    began = time.perf_counter()
    cluster_of, prototypes = cluster_slides(features, slide_of, clusters=clusters, min_regions=clusters, seed=0)
    clustered = time.perf_counter()
    match_slides(cluster_of, prototypes, np.bincount(slide_of, minlength=slides) >= clusters, 1)
    matched = time.perf_counter()
    rows = [[f"clusters of {regions:,} regions, {slides:,} slides", f"{clustered - began:.1f}"]]
    rows += [[f"matching of {slides * (slides - 1) // 2:,} pairs", f"{matched - clustered:.1f}"]]
    print_table("SLPD", ["", "s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", default=["regions", "grids", "clusters"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slides", type=int, default=1000)
    parser.add_argument("--regions", type=int, default=60000)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(asked.threads)
    keep_freed_memory()
    if "regions" in asked.measure:
        measure_regions(asked.rounds, device)
    if "grids" in asked.measure:
        measure_grids(asked.rounds, device)
    if "clusters" in asked.measure:
        measure_clusters(asked.slides, asked.regions)


if __name__ == "__main__":
    main()
