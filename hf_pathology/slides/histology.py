"""Draws H&E-like tissue: its outline, fibres and nuclei as two maps of stain, then their colours on lit glass.

Stain turns into colour by Beer and Lambert's law, with stain vectors that vary around those of Ruifrok and Johnston (2001).
All lengths are pixels of 0.5 um.
"""

import cv2
import numpy as np

from .nests import CLEARANCE, Nest, Nuclei, polygon, ripple
from .tissue import fill_small_holes, remove_small_pieces


HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.13, 0.85, 0.42)  # optical densities of red, green, blue
INKS = {  # of marker pens, likewise
    "red": (0.20, 1.90, 1.75),
    "green": (1.80, 0.65, 1.35),
    "blue": (1.90, 1.25, 0.35),
    "black": (2.40, 2.35, 2.25),
}
STROMA_SPACING = 27.0  # of the lattice on which nuclei of the stroma may be
FAT_SPACING = 100.0  # between fat cells
LYMPHOID_SPACING = 15.0  # between lymphocytes of an aggregate
FRACTION_BITS = 4  # OpenCV draws at sixteenths of a pixel


def draw_outline(rng: np.random.Generator, size: int) -> np.ndarray:
    """One to three ragged pieces over some 40 % of the slide, on some slides with a tear, bool (size, size)."""
    coarse = size // 8
    y, x = np.mgrid[:coarse, :coarse].astype(np.float32) / coarse - 0.5
    tilt, pieces = rng.uniform(0, np.pi), int(rng.integers(1, 2 + min(2, size // 1000)))
    along, across = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    height = np.full((coarse, coarse), -np.inf, np.float32)
    for piece in range(pieces):
        place = (piece - (pieces - 1) / 2) * 0.75 / pieces
        radii = rng.uniform(0.85, 1.1, 2) * (0.36 / pieces, 0.36)
        height = np.maximum(
            height, 1 - np.hypot((along - place) / radii[0], (across - rng.normal(0, 0.03)) / radii[1])
        )
    for cell, weight in ((size / 4, 0.18), (size / 10, 0.08), (100, 0.04)):
        height += weight * smooth_noise(rng, coarse, cell / 8)
    height[np.maximum(abs(x), abs(y)) > 0.47] = -np.inf
    tissue = height > np.quantile(height, 1 - rng.uniform(0.36, 0.48))
    if rng.random() < 0.4 and size >= 2000:
        centre_y, centre_x = rng.choice(np.argwhere(tissue))
        distance = np.hypot(x - x[0, centre_x], y - y[centre_y, 0]) * size
        tissue &= distance > rng.uniform(160, 240) * (1 + 0.15 * smooth_noise(rng, coarse, 15))  # 160 um and more
    tissue = fill_small_holes(remove_small_pieces(tissue, 1000), 1000)  # of 126 um
    soft = cv2.GaussianBlur(tissue.astype(np.float32), (0, 0), 1.5)
    return cv2.resize(soft, (size, size), interpolation=cv2.INTER_CUBIC) + 0.12 * smooth_noise(rng, size, 14) > 0.5


def draw_pattern(rng: np.random.Generator, tissue: np.ndarray, share: float) -> np.ndarray:
    """The smooth patches of `tissue` (bool (size, size)) that make up `share` of its area, bool (size, size)."""
    size = len(tissue)
    noise = smooth_noise(rng, size, size / 6)
    return tissue & (noise > np.quantile(noise[::8, ::8][tissue[::8, ::8]], 1 - share))


def stain_tissue(
    rng: np.random.Generator, tissue: np.ndarray, depth: np.ndarray, pattern: np.ndarray, nests: list[Nest]
) -> tuple[np.ndarray, np.ndarray]:
    """The concentrations of haematoxylin and of eosin, float32 (size, size) each, 1 being strong.

    Args:
        tissue: bool (size, size); `depth` uint8 (size, size), the distance to its edge, 255 being 255 or more.
        nests: what is drawn on `pattern`, bool (size, size); elsewhere there are patches of fat cells and of
            lymphocytes. Stroma is everywhere, here dense, there loose.
    """
    size = len(tissue)
    cells, holes, nuclei = (np.zeros((size, size), np.uint8) for _ in range(3))
    fill_polygons(cells, [nest.outline for nest in nests])
    fat = place_fat(rng, depth, pattern)
    fill_polygons(holes, [hole for nest in nests for hole in nest.holes] + fat)
    fibres, angle = draw_fibres(rng, size)
    taken = cv2.dilate(cells | holes, np.ones((17, 17), np.uint8)) > 0
    room = tissue & ~taken
    lymphoid = room & ~pattern & (smooth_noise(rng, size, size / 11) > 0.9)
    draw_nuclei(rng, nuclei, stroma_nuclei(rng, room & ~lymphoid, angle))
    draw_nuclei(rng, nuclei, lymphocytes(rng, lymphoid))
    for nest in nests:
        draw_nuclei(rng, nuclei, nest.nuclei)

    grain = smooth_noise(rng, size, 3)  # from here on in place: each map takes 36 MB at 3000 pixels
    cells, nuclei = soften(cells, 4), soften(nuclei, 1)
    present = soften(tissue.astype(np.uint8) * 255, 2)
    present *= 1 - soften(holes, 1.5)
    eosin = fibres
    eosin *= 1 + 0.28 * np.clip(smooth_noise(rng, size, 220), -2, 2)
    eosin += (0.5 - eosin) * cells  # cytoplasm is even, and on average as dark as the fibres
    eosin *= (1 + 0.05 * grain) * (1 - 0.4 * nuclei)
    eosin *= present
    haematoxylin = grain
    haematoxylin *= 0.12
    haematoxylin += 0.85
    haematoxylin *= nuclei
    haematoxylin += 0.1 + 0.08 * cells
    haematoxylin *= present
    return haematoxylin, eosin


def place_fat(rng: np.random.Generator, depth: np.ndarray, pattern: np.ndarray) -> list[np.ndarray]:
    """Fat cells in patches outside the pattern, polygons (P, 2), each clear of its neighbours and of nests."""
    size = len(depth)
    patches = smooth_noise(rng, size, size / 9) > 0.6
    cells = []
    for centre in jittered_lattice(rng, size, FAT_SPACING, 14):
        radius = rng.uniform(20, 42)
        x, y = centre.astype(int)
        near = pattern[max(0, y - 120) : y + 120, max(0, x - 120) : x + 120]
        if patches[y, x] and depth[y, x] > radius + CLEARANCE and not near.any():
            cells.append(centre + radius * polygon(ripple(rng, 40, 0.1)))
    return cells


def stroma_nuclei(rng: np.random.Generator, room: np.ndarray, angle: np.ndarray) -> Nuclei:
    """Nuclei where `room` (bool (size, size)), here sparse, there dense: spindles along the fibres, and small round ones."""
    xy = jittered_lattice(rng, len(room), STROMA_SPACING, 10)
    round_ = rng.random(len(xy)) < 0.5
    axes = np.where(round_[:, None], rng.uniform(4.5, 6.5, (len(xy), 1)), rng.uniform((7, 2.5), (12, 4), (len(xy), 2)))
    column, row = xy.astype(int).T
    fibre = angle[row * len(angle) // len(room), column * len(angle) // len(room)] + rng.normal(0, 12, len(xy))
    crowd = np.clip(0.3 + 0.3 * smooth_noise(rng, len(room), 260)[row, column], 0.12, 0.85)
    keep = room[row, column] & (rng.random(len(xy)) < crowd)
    return Nuclei(xy[keep], axes[keep], fibre[keep])


def lymphocytes(rng: np.random.Generator, room: np.ndarray) -> Nuclei:
    """Small round nuclei, close together, where `room` (bool (size, size))."""
    xy = jittered_lattice(rng, len(room), LYMPHOID_SPACING, 4)
    column, row = xy.astype(int).T
    xy = xy[room[row, column] & (rng.random(len(xy)) < 0.9)]
    return Nuclei(xy, rng.uniform(4.5, 6, (len(xy), 1)) * np.ones(2), np.zeros(len(xy)))


def draw_fibres(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Wavy fibres, float32 (size, size) around 0.5, and their direction in degrees, float32 (size // 8, size // 8)."""
    period = 1024
    frequency_y, frequency_x = np.meshgrid(np.fft.fftfreq(period), np.fft.rfftfreq(period), indexing="ij")
    spectrum = np.fft.rfft2(rng.standard_normal((period, period)))
    streaks = np.zeros((period, period))
    for length, width, weight in ((30, 2.2, 0.8), (60, 6, 0.6)):
        one = np.fft.irfft2(
            spectrum * np.exp(-2 * np.pi**2 * ((frequency_x * length) ** 2 + (frequency_y * width) ** 2))
        )
        streaks += weight * one / one.std()
    coarse = size // 8
    row, column = np.mgrid[:coarse, :coarse].astype(np.float32) * (size / coarse)
    tilt = rng.uniform(0, np.pi)
    along = column * np.cos(tilt) + row * np.sin(tilt) + 40 * smooth_noise(rng, coarse, 50)
    across = (
        row * np.cos(tilt)
        - column * np.sin(tilt)
        + 90 * smooth_noise(rng, coarse, 60)
        + 8 * smooth_noise(rng, coarse, 9)
    )
    across += 3 * smooth_noise(rng, coarse, 3)
    slope_y, slope_x = np.gradient(across)
    angle = np.degrees(np.arctan2(-slope_x, slope_y)).astype(np.float32)  # along lines of equal `across`
    maps = (cv2.resize(plane.astype(np.float32), (size, size)) for plane in (along, across))
    drawn = cv2.remap(streaks.astype(np.float32), *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return np.clip(0.5 + 0.2 * drawn, 0.12, 0.95), angle


def render(
    colour_rng: np.random.Generator, glass_rng: np.random.Generator, haematoxylin: np.ndarray, eosin: np.ndarray
) -> np.ndarray:
    """The colours of stained tissue on glass, uint8 RGB (size, size, 3), from concentrations, float32 (size, size).

    The hue and strength of both stains come from `colour_rng`, uneven light and sensor noise from `glass_rng`.
    """
    size = len(eosin)
    vectors = np.array([HAEMATOXYLIN, EOSIN]) * np.exp(colour_rng.normal(0, 0.16, (2, 3)))
    vectors *= np.array([[colour_rng.uniform(1.2, 2.1)], [colour_rng.uniform(0.65, 1.2)]])
    white = colour_rng.uniform(241, 249) + colour_rng.uniform(-3, 3, 3)
    shade = 0.012 * np.abs(smooth_noise(glass_rng, size, size / 2))
    noise = glass_rng.standard_normal((size, size), dtype=np.float32)
    image = np.empty((size, size, 3), np.uint8)
    for channel, (h, e) in enumerate(vectors.T):
        density = np.float32(h) * haematoxylin
        density += np.float32(e) * eosin
        density += shade
        light = np.exp(-density, out=density)
        light *= np.float32(white[channel])
        light += np.float32(colour_rng.uniform(1.3, 1.9)) * noise
        image[..., channel] = np.clip(light, 0, 255, out=light)
    return image


def draw_ink(rng: np.random.Generator, image: np.ndarray, tissue: np.ndarray, ink: str) -> np.ndarray:
    """Where a stroke of `ink` (a key of `INKS`) was drawn into `image` across the edge of `tissue`, bool (size, size)."""
    size = len(tissue)
    rim = tissue[::8, ::8] ^ cv2.erode(tissue[::8, ::8].astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    start_y, start_x = rng.choice(np.argwhere(rim)) * 8
    t = np.linspace(-0.5, 0.5, 60)[:, None]
    turn = rng.uniform(0, np.pi)
    forward, aside = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    path = (start_x, start_y) + size * (rng.uniform(0.25, 0.4) * t * forward + 0.03 * np.sin(7 * t) * aside)
    stroke = np.zeros((size, size), np.uint8)
    width = int(max(64, size * rng.uniform(0.022, 0.032)))
    cv2.polylines(stroke, [np.rint(path).astype(np.int32)], False, 255, width, cv2.LINE_AA)
    density = cv2.GaussianBlur(stroke, (0, 0), 2).astype(np.float32) / 255 * (1 + 0.08 * smooth_noise(rng, size, 40))
    for channel, absorbance in enumerate(INKS[ink]):
        image[..., channel] = image[..., channel] * np.exp(-absorbance * density)
    return stroke > 127


def draw_nuclei(rng: np.random.Generator, canvas: np.ndarray, nuclei: Nuclei) -> None:
    """Draws ellipses of varied darkness, with a darker rim, into `canvas` uint8 (size, size)."""
    unit = 1 << FRACTION_BITS
    darkness = rng.integers(165, 235, len(nuclei.xy))
    for xy, axes, angle, dark in zip(nuclei.xy * unit, nuclei.axes * unit, nuclei.angle, darkness.tolist()):
        place = (np.rint(xy).astype(int).tolist(), np.rint(axes).astype(int).tolist(), float(angle), 0, 360)
        cv2.ellipse(canvas, *place, dark, cv2.FILLED, cv2.LINE_AA, FRACTION_BITS)
        cv2.ellipse(canvas, *place, min(255, dark + 35), 1, cv2.LINE_AA, FRACTION_BITS)


def fill_polygons(canvas: np.ndarray, polygons: list[np.ndarray]) -> None:
    """Fills `polygons`, float (P, 2) in pixels, with 255 in `canvas` uint8 (size, size)."""
    for corners in polygons:
        fixed = np.rint(corners * (1 << FRACTION_BITS)).astype(np.int32)
        cv2.fillPoly(canvas, [fixed], 255, cv2.LINE_AA, FRACTION_BITS)


def soften(canvas: np.ndarray, sigma: float) -> np.ndarray:
    """`canvas` (uint8) blurred and scaled to 0..1, float32."""
    return cv2.GaussianBlur(canvas, (0, 0), sigma).astype(np.float32) / np.float32(255)


def smooth_noise(rng: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """Noise of mean 0 and standard deviation about 1 whose features are `cell` pixels wide, float32 (size, size)."""
    count = int(np.ceil(size / cell)) + 2
    coarse = rng.standard_normal((count, count), dtype=np.float32)
    edge = max(size, round(count * cell))
    return cv2.resize(coarse, (edge, edge), interpolation=cv2.INTER_CUBIC)[:size, :size]


def jittered_lattice(rng: np.random.Generator, size: int, spacing: float, jitter: float) -> np.ndarray:
    """Points on a square lattice, each moved by up to `jitter` pixels, float (N, 2), inside (size, size)."""
    steps = np.arange(spacing / 2, size, spacing)
    xy = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    return np.clip(xy + rng.uniform(-jitter, jitter, xy.shape), 0, size - 1)
