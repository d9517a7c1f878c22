"""Draws H&E-like tissue of two classes that differ in how nuclei are arranged, and in nothing else.

A slide is two maps of stain concentration, haematoxylin and eosin, turned into colour by Beer and Lambert's law with stain
vectors of its own (around those of Ruifrok and Johnston, 2001). Part of its tissue carries nests of cells. In a glandular
nest the nuclei line one lumen; in a solid nest as many nuclei of the same sizes fill the same outline, between three vacuoles
that together have the lumen's area. So the number of nuclei and the colours are the same, and only the texture tells the class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .tissue import Tissue, fill_small_holes, remove_small_pieces


MPP = 0.5  # microns per pixel of all drawings; the lengths below are pixels
LABELS = ("glandular", "solid")
INKS = {  # optical density (red, green, blue) of a marker pen
    "red": (0.20, 1.90, 1.75),
    "green": (1.80, 0.65, 1.35),
    "blue": (1.90, 1.25, 0.35),
    "black": (2.40, 2.35, 2.25),
}
HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.14, 0.88, 0.45)
NEST_SPACING = 190.0
NEST_RADIUS = (62.0, 92.0)
STROMA_SPACING = 42.0
TRUTH_DOWNSAMPLE = 4
FRACTION_BITS = 4  # OpenCV draws at sixteenths of a pixel


@dataclass(frozen=True)
class Nuclei:
    """Ellipses: centres `xy` float (N, 2) and semi-axes `axes` float (N, 2) in pixels, `angle` float (N,) in degrees."""

    xy: np.ndarray
    axes: np.ndarray
    angle: np.ndarray


@dataclass(frozen=True)
class Nest:
    """A nest of cells: its outline, and its holes (one lumen or three vacuoles), polygons float (P, 2), and its nuclei."""

    outline: np.ndarray
    holes: list[np.ndarray]
    nuclei: Nuclei


def draw_slide(
    seed: int | Sequence[int],
    label: str | None,
    size: int,
    *,
    pen: str | None = None,
    pattern_share: float = 0.45,
    purity: float = 0.9,
) -> tuple[np.ndarray, Tissue]:
    """A square slide of `size` pixels at 0.5 mpp, uint8 RGB (size, size, 3), and its true tissue at a quarter of the scale.

    Args:
        seed: decides everything; another label with the same seed is the same tissue in the same colours.
        label: one of `LABELS`; None draws glass without tissue.
        pen: a key of `INKS` draws one stroke of that marker across an edge of the tissue.
        pattern_share: between 0 and 1, the share of the tissue that carries nests; less is harder.
        purity: between 0.5 and 1, the share of nests with the class's own arrangement, the others having the other
            class's; at 0.5 the classes are the same.

    True tissue includes lumens, vacuoles and fat cells, and excludes tears of 100 um and more, and ink.
    """
    streams = np.random.SeedSequence(seed).spawn(6)
    outline_rng, nest_rng, stroma_rng, colour_rng, glass_rng, pen_rng = (np.random.default_rng(s) for s in streams)
    glass = draw_glass(glass_rng, size)  # float32 (size, size), relative illumination
    if label is None:
        empty = np.zeros((size // TRUTH_DOWNSAMPLE, size // TRUTH_DOWNSAMPLE), bool)
        nothing = np.zeros((size, size), np.float32)
        return render(colour_rng, glass_rng, glass, nothing, nothing), Tissue(empty, (size / len(empty),) * 2)
    tissue = draw_outline(outline_rng, size)  # bool (size, size)
    nests = place_nests(nest_rng, tissue, label, pattern_share, purity)
    haematoxylin, eosin = stain_tissue(stroma_rng, tissue, nests)
    image = render(colour_rng, glass_rng, glass, haematoxylin, eosin)
    if pen is not None:
        stroke = pen_stroke(pen_rng, tissue)  # uint8 (size, size)
        apply_ink(pen_rng, image, stroke, INKS[pen])
        tissue &= stroke < 128
    small = cv2.resize(
        tissue.astype(np.uint8) * 255, (size // TRUTH_DOWNSAMPLE,) * 2, interpolation=cv2.INTER_AREA
    )
    return image, Tissue(small > 127, (size / len(small),) * 2)


def draw_outline(rng: np.random.Generator, size: int) -> np.ndarray:
    """One to three ragged pieces over 38 to 50 % of the slide, some with a tear, bool (size, size)."""
    coarse = size // 8
    y, x = np.mgrid[:coarse, :coarse].astype(np.float32) / coarse - 0.5
    tilt, pieces = rng.uniform(0, np.pi), rng.integers(1, 4)
    height = np.full((coarse, coarse), -np.inf, np.float32)
    for piece in range(pieces):
        place = (piece - (pieces - 1) / 2) * 0.62 / pieces
        centre = np.array([np.cos(tilt), np.sin(tilt)]) * place + rng.uniform(-0.04, 0.04, 2)
        u = (x - centre[0]) * np.cos(tilt) + (y - centre[1]) * np.sin(tilt)
        v = (y - centre[1]) * np.cos(tilt) - (x - centre[0]) * np.sin(tilt)
        height = np.maximum(height, -np.hypot(u / (0.42 / pieces), v / rng.uniform(0.3, 0.36)))
    for cell, weight in ((size / 4, 0.22), (size / 10, 0.12), (120, 0.05)):
        height += weight * smooth_noise(rng, coarse, cell / 8)
    height -= 4 * np.maximum(0, np.maximum(abs(x), abs(y)) - 0.46) * 25
    tissue = height > np.quantile(height, 1 - rng.uniform(0.38, 0.5))
    if rng.random() < 0.4 and size >= 2000:
        centre = rng.choice(np.argwhere(tissue))[::-1]
        ragged = np.hypot(x - x[0, centre[0]], y - y[centre[1], 0]) * size * (1 + 0.2 * smooth_noise(rng, coarse, 15))
        tissue &= ragged > rng.uniform(160, 240)  # a tear of 80 to 120 um radius
    tissue = fill_small_holes(remove_small_pieces(tissue, 1600), 1600)  # 160 um: well above what find_tissue drops
    edge = cv2.resize(cv2.GaussianBlur(tissue.astype(np.float32), (0, 0), 1.5), (size, size), interpolation=cv2.INTER_CUBIC)
    return edge + 0.12 * smooth_noise(rng, size, 14) > 0.5


def place_nests(
    rng: np.random.Generator, tissue: np.ndarray, label: str, pattern_share: float, purity: float
) -> list[Nest]:
    """Nests on a jittered hexagonal lattice in a connected share of the tissue, clear of its edge."""
    size = len(tissue)
    coarse = cv2.resize(tissue.astype(np.uint8), (size // 4, size // 4), interpolation=cv2.INTER_AREA)
    depth = cv2.distanceTransform(coarse, cv2.DIST_L2, 5) * 4
    pattern = smooth_noise(rng, size // 4, size / 12)
    pattern = pattern > np.quantile(pattern[coarse > 0], 1 - pattern_share)
    nests = []
    for row, y in enumerate(np.arange(NEST_SPACING / 2, size, NEST_SPACING * np.sqrt(3) / 2)):
        for x in np.arange(NEST_SPACING / 2 * (1 + row % 2), size, NEST_SPACING):
            nest_rng = np.random.default_rng(rng.integers(2**63))  # the same nest for either label
            centre = np.array([x, y]) + nest_rng.uniform(-14, 14, 2)
            radius = nest_rng.uniform(*NEST_RADIUS)
            own = nest_rng.random() < purity
            at = tuple(np.clip(centre[::-1] / 4, 0, size // 4 - 1).astype(int))
            if pattern[at] and depth[at] > radius + 12:
                nests.append(draw_nest(nest_rng, centre, radius, glandular=(label == LABELS[0]) == own))
    return nests


def draw_nest(rng: np.random.Generator, centre: np.ndarray, radius: float, glandular: bool) -> Nest:
    """A nest round `centre` (x, y); number and sizes of nuclei, outline and area of holes do not depend on `glandular`."""
    wobble = 1 + 0.07 * np.sin(np.arange(48) * (2 * np.pi / 24) + rng.uniform(0, 6)) * rng.uniform(0, 1.5)
    outline = centre + radius * polygon(wobble)
    lumen = radius * rng.uniform(0.34, 0.46)
    count = int(2 * np.pi * 0.72 * radius / rng.uniform(14, 17))
    axes = np.stack([rng.uniform(6.5, 9.0, count), rng.uniform(4.2, 5.6, count)], axis=1)
    if glandular:
        turn = (np.arange(count) + rng.uniform(-0.25, 0.25, count)) * (2 * np.pi / count)
        ring = radius * rng.uniform(0.68, 0.82, count)
        xy = centre + ring[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        holes = [centre + rng.normal(0, 2, 2) + lumen * polygon(1 + 0.1 * np.sin(np.arange(48) * np.pi / 8))]
        return Nest(outline, holes, Nuclei(xy, axes, np.degrees(turn) + rng.normal(0, 12, count)))
    vacuole, start = lumen / np.sqrt(3), rng.uniform(0, 2 * np.pi)
    turn = start + np.arange(3) * (2 * np.pi / 3) + rng.uniform(-0.4, 0.4, 3)
    places = radius * rng.uniform(0.42, 0.6, 3)[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    spots = scatter(rng, 3 * count, 0.9 * radius)
    gap = np.linalg.norm(spots[:, None] - places, axis=2).min(axis=1) - vacuole  # (3 * count,), to the nearest vacuole
    spots = spread(spots[gap > 5], count)
    return Nest(
        outline,
        [centre + place + vacuole * polygon(np.ones(24)) for place in places],
        Nuclei(centre + spots, axes, rng.uniform(0, 180, count)),
    )


def spread(points: np.ndarray, count: int) -> np.ndarray:
    """`count` of `points` (N, 2), each the farthest from those taken before it."""
    taken, distance = [0], np.linalg.norm(points - points[0], axis=1)
    for _ in range(count - 1):
        taken.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[taken[-1]], axis=1))
    return points[taken]
