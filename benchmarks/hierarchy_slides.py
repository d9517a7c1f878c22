"""Slides composed of real tiles, to see what a second level adds: by the kind of tissue, and by how two kinds are arranged.

    python benchmarks/hierarchy_slides.py TILES OUT

TILES is a folder with a `manifest.csv` of path, class and group. OUT gets two cohorts of square Aperio slides with their
`cohort.csv`, and no picture is in two slides of a cohort:

- `tissue`: each slide shows three pictures of one class, whose name is its label;
- `arrangement`: each slide shows two pictures each of two classes, half and half, in squares of 64 pixels, "gathered" in
  patches or "scattered" at random. Squares lie on the grid of the tiles, so that both labels have the same tiles, and only where
  they lie tells one from the other.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from hf_pathology.slides.aperio import write_aperio
from hf_pathology.tiles.folder import LabelledTiles, read_tile, read_tile_folder


EDGE = 1536  # pixels of a slide
TISSUE_PIECE, ARRANGED_PIECE = 128, 64  # pixels
PATCH = 2.0  # pieces, the deviation of the blur that gathers
TWO_KINDS = ("lung_n", "lung_aca")
MPP = 1.0  # declared; that of the pictures is not known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    tiles = read_tile_folder(asked.tiles)
    rng = np.random.default_rng(asked.seed)
    write_cohort(asked.out / "tissue", tissue_slides(tiles, rng))
    write_cohort(asked.out / "arrangement", arranged_slides(tiles, rng))


def tissue_slides(tiles: LabelledTiles, rng: np.random.Generator):
    """Pairs of label and picture (EDGE, EDGE, 3), as many as there are pictures for."""
    for name in tiles.classes:
        for pictures in dealt(tiles, name, 3, rng):
            one_kind = np.zeros((EDGE // TISSUE_PIECE,) * 2, int)
            yield name, compose(one_kind, [pictures], TISSUE_PIECE, rng)


def arranged_slides(tiles: LabelledTiles, rng: np.random.Generator):
    """Pairs of label and picture (EDGE, EDGE, 3); the labels take turns."""
    both = zip(*(dealt(tiles, name, 2, rng) for name in TWO_KINDS))
    for number, pictures in enumerate(both):
        label = ("gathered", "scattered")[number % 2]
        field = rng.standard_normal((EDGE // ARRANGED_PIECE,) * 2)
        if label == "gathered":
            field = cv2.GaussianBlur(field, (0, 0), PATCH)
        kinds = (field > np.median(field)).astype(int)
        yield label, compose(kinds, pictures, ARRANGED_PIECE, rng)


def dealt(tiles: LabelledTiles, name: str, count: int, rng: np.random.Generator) -> list[list[np.ndarray]]:
    """The tiles of `count` source pictures for each slide, all of class `name`; the pictures that remain are left out."""
    of_class = tiles.labels == tiles.classes.index(name)
    groups = rng.permutation(np.unique(tiles.groups[of_class]))
    hands = groups[: len(groups) // count * count].reshape(-1, count)
    return [[read_tile(tiles.folder / path) for path in tiles.paths[np.isin(tiles.groups, hand)]] for hand in hands]


def compose(
    kinds: np.ndarray, pictures: Sequence[list[np.ndarray]], piece: int, rng: np.random.Generator
) -> np.ndarray:
    """A picture of square pieces, each from any place of any tile of its kind, turned and mirrored at random."""
    slide = np.empty((*(edge * piece for edge in kinds.shape), 3), np.uint8)
    for (row, column), kind in np.ndenumerate(kinds):
        tile = pictures[kind][rng.integers(len(pictures[kind]))]
        y, x = (rng.integers(edge - piece + 1) for edge in tile.shape[:2])
        cut = np.rot90(tile[y : y + piece, x : x + piece], rng.integers(4))
        cut = cut[:, ::-1] if rng.integers(2) else cut
        slide[row * piece : (row + 1) * piece, column * piece : (column + 1) * piece] = cut
    return slide


def write_cohort(folder: Path, slides) -> None:
    rows = []
    for number, (label, picture) in enumerate(slides):
        name = f"{number:03d}.svs"
        write_aperio(folder / name, picture, MPP, quality=90)
        rows.append({"slide": name, "case": number, "label": label})
    table = pd.DataFrame(rows)
    table.to_csv(folder / "cohort.csv", index=False)
    print(f"{folder}: {table.label.value_counts().to_dict()}")


if __name__ == "__main__":
    main()
