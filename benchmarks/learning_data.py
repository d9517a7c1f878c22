"""The tiles of the learning experiment with their colours and without, and what colour alone says of them.

    python benchmarks/learning_data.py TILES OUT --whiten --grey

TILES is a folder with a `manifest.csv` of path, class, group and split (train, val). OUT gets the same folder as

- `raw`: copies of the files;
- `controlled`: each channel of each tile has one mean and one standard deviation, those of the train tiles on average;
- `whitened`, with --whiten: each tile has the same means and the same 3 x 3 covariance of its channels;
- `grey`, with --grey: each tile has the same histogram of one grey channel, so that nothing but the places of its values
  tells it from another.

The first two changes are linear in each tile's pixels, and repeated until the numbers hold after clipping and rounding to
uint8. Each tile's numbers then differ from the others' by what is drawn at random, a twentieth of a grey value: less would be
left by clipping, but not at random, and could be read by whoever standardises it. Images are PNGs, so that nothing is lost.

The tables show how well the val tiles are classified by what can be known without looking at the tissue, and by untrained
encoders, with 95 % intervals of a bootstrap over groups.
"""

import argparse
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.preprocessing import StandardScaler
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers import ViTConfig, ViTModel

from hf_pathology.evaluation.intervals import Interval, accuracy_interval
from hf_pathology.evaluation.knn import weighted_knn
from hf_pathology.evaluation.tile_probe import embed_tiles, logistic_predictions
from hf_pathology.tiles.folder import LabelledTiles, read_tile, read_tile_folder


WOBBLE = 0.05  # grey values, standard deviation of what means and standard deviations of tiles differ by
CORRELATION_WOBBLE = 0.003  # the same of whitened tiles' correlations
CLOSE = 0.005  # grey values within which a tile has its numbers
ROUNDS = 400  # after which a tile is given up
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
VIEW = 96  # pixels, what the encoder of the experiment sees of a tile
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the published views have them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tiles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--whiten", action="store_true", help="write the whitened tiles too")
    parser.add_argument("--grey", action="store_true", help="write the grey tiles too")
    parser.add_argument("--untrained", type=int, default=3, help="how many untrained encoders are judged")
    options = parser.parse_args()
    tiles = read_tile_folder(options.tiles)
    with ThreadPoolExecutor() as threads:
        pixels = np.stack(list(threads.map(lambda path: read_tile(tiles.folder / path), tiles.paths)))
    copy_raw(tiles, options.out / "raw")
    print_version("raw", tiles, pixels, options.untrained)
    known = pixels[tiles.splits == "train"]
    mean, covariance = train_colours(known)
    for name, wanted in {"controlled": np.diag(np.diag(covariance)), "whitened": covariance}.items():
        if name == "controlled" or options.whiten:
            changed = controlled(pixels, mean, wanted)
            write_changed(tiles, changed, options.out / name)
            print_numbers(name, changed)
            print_version(name, tiles, changed, options.untrained)
    if options.grey:
        changed = greyed(pixels, grey_levels(known))
        write_changed(tiles, changed, options.out / "grey")
        print_numbers("grey", changed)
        print_version("grey", tiles, changed, options.untrained)


# The tiles.


def train_colours(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (3,) of the tiles, and a covariance (3, 3) with the mean of their standard deviations and correlations."""
    means, covariances = moments(pixels)
    spreads = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))  # (N, 3)
    correlations = covariances / spreads[:, :, None] / spreads[:, None, :]
    spread = spreads.mean(axis=0)
    return means.mean(axis=0), correlations.mean(axis=0) * spread[:, None] * spread


def moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (N, 3) and the covariance (N, 3, 3) of the channels of each tile."""

    def of_tile(tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        flat = tile.reshape(-1, 3).astype(np.float64)
        return flat.mean(axis=0), np.cov(flat.T, bias=True)

    with ThreadPoolExecutor() as threads:
        means, covariances = zip(*threads.map(of_tile, pixels))
    return np.stack(means), np.stack(covariances)


def controlled(pixels: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """The tiles with this mean (3,) and covariance (3, 3) of their channels, uint8; one that is diagonal says only spreads."""
    with ThreadPoolExecutor() as threads:
        return np.stack(list(threads.map(lambda *of: control(*of, mean, covariance), pixels, range(len(pixels)))))


def control(tile: np.ndarray, seed: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """One tile of `controlled`. Raises ValueError when its numbers cannot be reached."""
    rng = np.random.default_rng(seed)
    spread = np.sqrt(np.diag(covariance))
    correlation = covariance / spread[:, None] / spread
    whole = bool(np.any(correlation != np.eye(3)))
    wobble = np.tril(rng.normal(0, CORRELATION_WOBBLE, (3, 3)), -1) * whole
    mean, spread = mean + rng.normal(0, WOBBLE, 3), spread + rng.normal(0, WOBBLE, 3)
    wanted = (correlation + wobble + wobble.T) * spread[:, None] * spread
    values = tile.reshape(-1, 3).astype(np.float32)
    for number in range(ROUNDS):
        # Rounded at random, for areas of one colour would jump together; at random anew when they go to and fro.
        if number % 20 == 0:
            up = rng.random(values.shape, np.float32)
        rounded = np.clip(np.floor(values + up), 0, 255)
        have_mean, have = rounded.mean(axis=0, dtype=np.float64), np.cov(rounded.T, bias=True)
        have = have if whole else np.diag(np.diag(have))
        off = max(
            np.abs(have_mean - mean).max(), np.abs((have - wanted) / spread / spread[:, None]).max() * spread.max()
        )
        if off < CLOSE:
            return rounded.astype(np.uint8).reshape(tile.shape)
        values = ((values - have_mean) @ transport(have, wanted) + mean).astype(np.float32)
    raise ValueError(f"after {ROUNDS} rounds a tile is still {off:.3f} grey values off")


def transport(have: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The symmetric matrix that makes the covariance `wanted` of `have` and moves colours least (Olkin and Pukelsheim 1982)."""
    half = root(have)
    back = np.linalg.inv(half)
    return back @ root(half @ wanted @ half) @ back


def root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


def grey_levels(pixels: np.ndarray) -> np.ndarray:
    """The mean over the tiles of their sorted grey values, uint8 (h * w,)."""
    return np.rint(np.mean([np.sort(grey(tile).reshape(-1)) for tile in pixels], axis=0)).astype(np.uint8)


def greyed(pixels: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The tiles, uint8, with the grey values `levels` in the order of their own; among equals by their surroundings."""

    def of_tile(tile: np.ndarray, seed: int) -> np.ndarray:
        values = grey(tile)
        at_random = np.random.default_rng(seed).random(values.shape)
        order = np.lexsort([key.reshape(-1) for key in (at_random, cv2.blur(values, (5, 5)), values)])
        ranked = np.empty_like(levels)
        ranked[order] = levels
        return np.repeat(ranked.reshape(*values.shape, 1), 3, axis=2)

    with ThreadPoolExecutor() as threads:
        return np.stack(list(threads.map(of_tile, pixels, range(len(pixels)))))


def grey(tile: np.ndarray) -> np.ndarray:
    """The luma of a tile, float32 (h, w), in whole numbers."""
    return np.rint(tile.astype(np.float32) @ np.float32(LUMA))


def copy_raw(tiles: LabelledTiles, out: Path) -> None:
    for path in tiles.paths:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tiles.folder / path, out / path)
    write_manifest(tiles, list(tiles.paths), out)


def write_changed(tiles: LabelledTiles, pixels: np.ndarray, out: Path) -> None:
    paths = [Path(path).with_suffix(".png").as_posix() for path in tiles.paths]
    for folder in {(out / path).parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda path, tile: Image.fromarray(tile).save(out / path, compress_level=3), paths, pixels))
    write_manifest(tiles, paths, out)


def write_manifest(tiles: LabelledTiles, paths: list[str], out: Path) -> None:
    columns = {"path": paths, "class": np.array(tiles.classes)[tiles.labels], "label": tiles.labels}
    table = pd.DataFrame({**columns, "group": tiles.groups, "split": tiles.splits})
    table.to_csv(out / "manifest.csv", index=False)


# What is known without the tissue.


def six_numbers(pixels: np.ndarray) -> np.ndarray:
    means, covariances = moments(pixels)
    return np.concatenate([means, np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))], axis=1)


def nine_numbers(pixels: np.ndarray) -> np.ndarray:
    means, covariances = moments(pixels)
    return np.concatenate([means, covariances[:, *np.tril_indices(3)]], axis=1)


def histograms(pixels: np.ndarray) -> np.ndarray:
    """Of each channel by itself, 32 bins; square roots, whose cosines are the overlap (Bhattacharyya 1943)."""
    return np.sqrt(
        [np.concatenate([np.bincount(c, minlength=32) for c in tile.reshape(-1, 3).T // 8]) for tile in pixels]
    )


def joint_histogram(pixels: np.ndarray) -> np.ndarray:
    """Of the colours, 8 bins along each channel; square roots."""
    return np.sqrt([np.bincount(tile.reshape(-1, 3) // 32 @ [64, 8, 1], minlength=512) for tile in pixels])


def seen(pixels: np.ndarray) -> torch.Tensor:
    """The tiles as the encoder sees them, uint8 (N, 3, VIEW, VIEW)."""
    parts = [torch.from_numpy(tile).permute(2, 0, 1) for tile in pixels]
    return torch.stack([F.resize(tile, [VIEW, VIEW], InterpolationMode.BICUBIC, antialias=True) for tile in parts])


def six_numbers_seen(pixels: np.ndarray) -> np.ndarray:
    return six_numbers(seen(pixels).permute(0, 2, 3, 1).numpy())


def untrained(pixels: np.ndarray, seed: int) -> np.ndarray:
    """The class token of a ViT of width 192 and depth 6, patch 16, as the experiment's is before its first step."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=VIEW,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    vit = ViTModel(config, add_pooling_layer=False)
    tokens = embed_tiles(vit, seen(pixels), lambda model, x: model(x).last_hidden_state[:, 0], mean=MEAN, std=STD)
    return tokens.numpy()


COLOURS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], bool]] = {  # and whether to standardise for neighbours
    "mean, sd (6 numbers)": (six_numbers, True),
    f"the same at {VIEW} px": (six_numbers_seen, True),
    "mean, covariance (9)": (nine_numbers, True),
    "channel histograms (3 x 32)": (histograms, False),
    "colour histogram (8 x 8 x 8)": (joint_histogram, False),
}


# The tables.


def print_numbers(name: str, pixels: np.ndarray) -> None:
    """What the channels of all tiles are like, and how far a tile is from it at most."""
    means, covariances = moments(pixels)
    spreads = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))
    correlations = (covariances / spreads[:, :, None] / spreads[:, None, :])[:, *np.tril_indices(3, -1)]
    print(f"\n{name}, over the tiles:")
    for title, numbers in (("mean", means), ("sd", spreads), ("correlation rg, rb, gb", correlations)):
        middle = numbers.mean(axis=0)
        print(
            f"  {title} {middle.round(2)}, sd {numbers.std(axis=0).round(3)}, at most {abs(numbers - middle).max():.3f} off"
        )
    ends = np.mean((pixels == 0) | (pixels == 255), axis=(1, 2, 3))
    print(f"  values at 0 or 255: {ends.mean():.2%}, in a tile at most {ends.max():.2%}", flush=True)


def print_version(name: str, tiles: LabelledTiles, pixels: np.ndarray, n_untrained: int) -> None:
    """The accuracies on the val tiles, in percent with their intervals."""
    print(f"\n| {name} | kNN | logistic regression |\n|---|---|---|")
    for title, (features_of, standardise) in COLOURS.items():
        print_row(title, tiles, features_of(pixels), standardise)
    for seed in range(n_untrained):
        print_row(f"untrained ViT, seed {seed}", tiles, untrained(pixels, seed), False)


def print_row(title: str, tiles: LabelledTiles, features: np.ndarray, standardise: bool) -> None:
    train, val = tiles.splits == "train", tiles.splits == "val"
    scaled = StandardScaler().fit(features[train]).transform(features) if standardise else features
    votes = weighted_knn(scaled[train], tiles.labels[train], scaled[val])
    regression = logistic_predictions(features[train], tiles.labels[train], tiles.groups[train], features[val])
    found = [
        accuracy_interval(tiles.groups[val], predicted == tiles.labels[val], seed=0)
        for predicted in (votes.argmax(dim=1).numpy(), regression)
    ]
    print(f"| {title} | {percent(found[0])} | {percent(found[1])} |", flush=True)


def percent(found: Interval) -> str:
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


if __name__ == "__main__":
    main()
