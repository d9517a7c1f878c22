"""Draws the one thing in which the two classes of synthetic slides differ: how nuclei are arranged in nests of cells.

In a glandular nest the nuclei line one lumen. In a solid nest the same number of nuclei, of the same sizes, fills the same
outline, between seven vacuoles that together have the lumen's area. So colours and counts are the same in both.
"""

from dataclasses import dataclass

import numpy as np


LABELS = ("glandular", "solid")
SPACING = 172.0  # of the lattice of nests; all lengths are pixels of 0.5 um
RADIUS = (58.0, 84.0)  # 58 to 84 um across
VACUOLES = 7
CLEARANCE = 12.0  # between a nest and the edge of the tissue


@dataclass(frozen=True)
class Nuclei:
    """Ellipses: centres `xy` float (N, 2) and semi-axes `axes` float (N, 2) in pixels, `angle` float (N,) in degrees."""

    xy: np.ndarray
    axes: np.ndarray
    angle: np.ndarray


@dataclass(frozen=True)
class Nest:
    """A nest of cells: its outline, polygon float (P, 2) in pixels, its holes, likewise, and its nuclei."""

    outline: np.ndarray
    holes: list[np.ndarray]
    nuclei: Nuclei


def place_nests(
    rng: np.random.Generator, depth: np.ndarray, pattern: np.ndarray, label: str, purity: float
) -> list[Nest]:
    """Nests on a jittered hexagonal lattice wherever `pattern` is True and the tissue is deep enough.

    Args:
        depth: uint8 (size, size), the distance of each pixel to the edge of the tissue, 255 being 255 or more.
        pattern: bool (size, size), the tissue that carries nests.
        label: one of `LABELS`.
        purity: between 0.5 and 1, how likely a nest is to have the arrangement of `label` and not of the other one.

    The same `rng` places the same nests for either label.
    """
    size = len(depth)
    nests = []
    for row, y in enumerate(np.arange(SPACING / 2, size, SPACING * np.sqrt(3) / 2)):
        for x in np.arange(SPACING / 2 * (1 + row % 2), size, SPACING):
            nest_rng = np.random.default_rng(rng.integers(2**63))
            centre = np.clip((x, y) + nest_rng.uniform(-12, 12, 2), 0, size - 1)
            radius = nest_rng.uniform(*RADIUS)
            own = nest_rng.random() < purity
            column, line = centre.astype(int)
            if pattern[line, column] and depth[line, column] > 1.2 * radius + CLEARANCE:
                nests.append(draw_nest(nest_rng, centre, radius, glandular=(label == LABELS[0]) == own))
    return nests


def draw_nest(rng: np.random.Generator, centre: np.ndarray, radius: float, glandular: bool) -> Nest:
    """A nest round `centre` (x, y) of mean `radius`.

    Its outline, the number, size and colour of its nuclei and the area of its holes do not depend on `glandular`.
    """
    stretch, tilt = rng.uniform(1, 1.18), rng.uniform(0, np.pi)
    axes = np.array([direction(tilt), direction(tilt + np.pi / 2)])  # rows: the long axis and the short one
    shear = axes.T @ np.diag([stretch, 1 / stretch]) @ axes  # (2, 2), keeps areas
    outline = radius * polygon(ripple(rng, 48, 0.08))
    lumen = radius * rng.uniform(0.42, 0.54)
    count = int(2 * np.pi * 0.75 * radius / rng.uniform(14, 17))
    axes = np.stack([rng.uniform(6.5, 9.5, count), rng.uniform(4.2, 6.0, count)], axis=1)  # nuclei of 4 to 9.5 um
    if glandular:
        turn = circle(count) + rng.uniform(-1.5, 1.5, count) / count
        spots = radius * rng.uniform(0.66, 0.84, (count, 1)) * direction(turn)
        angle = np.degrees(turn) + rng.normal(0, 15, count)
        holes = [lumen * polygon(ripple(rng, 48, 0.15))]
    else:
        radii = lumen * np.sqrt(rng.dirichlet([12] * VACUOLES))  # together of the lumen's area
        vacuoles = spread(0.68 * radius * scatter(rng, 200), VACUOLES)
        holes = [place + edge * polygon(ripple(rng, 24, 0.08)) for place, edge in zip(vacuoles, radii)]
        spots = 0.88 * radius * scatter(rng, 600)
        clear = (np.linalg.norm(spots[:, None] - vacuoles, axis=2) - radii).min(axis=1) > 5
        spots, angle = spread(spots[clear], count), rng.uniform(0, 180, count)
    return Nest(
        centre + outline @ shear,
        [centre + hole @ shear for hole in holes],
        Nuclei(centre + spots @ shear, axes, angle),
    )


def scatter(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` points (`count`, 2), evenly random inside the unit circle."""
    return np.sqrt(rng.random((count, 1))) * direction(rng.uniform(0, 2 * np.pi, count))


def spread(points: np.ndarray, count: int) -> np.ndarray:
    """`count` of `points` (N, 2), none near another: each is the farthest from those taken before it."""
    taken, distance = [0], np.linalg.norm(points - points[0], axis=1)
    for _ in range(count - 1):
        taken.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[taken[-1]], axis=1))
    return points[taken]


def circle(count: int) -> np.ndarray:
    """`count` angles evenly round a circle, radians."""
    return np.arange(count) * (2 * np.pi / count)


def ripple(rng: np.random.Generator, count: int, depth: float) -> np.ndarray:
    """Radii (`count`,) of an uneven outline whose area is that of a circle of radius 1, give or take `depth`."""
    waves = np.array([[2], [3], [5]])
    height = rng.normal(0, depth / 2, (3, 1)) * np.sin(waves * circle(count) + rng.uniform(0, 6, (3, 1)))
    radius = 1 + height.sum(axis=0)
    return radius / np.sqrt(np.mean(radius**2))


def direction(angle: np.ndarray) -> np.ndarray:
    """Unit vectors (N, 2) at `angle` (N,) in radians."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def polygon(radius: np.ndarray) -> np.ndarray:
    """A closed polygon (P, 2) round (0, 0) with its P corners at `radius` (P,)."""
    return radius[:, None] * direction(circle(len(radius)))
