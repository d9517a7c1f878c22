"""Cuts tiles out of stored ones, each decoded once, straight to where its pixels are needed, and resamples them."""

from collections import defaultdict
from collections.abc import Sequence

import cv2
import numpy as np

from .stored import Checksums, StoredLevel


WHITE = 255


def cut_tiles(
    level: StoredLevel,
    file: int,
    corners: Sequence[tuple[int, int]],
    source: tuple[int, int],
    out: Sequence[np.ndarray],
    checksums: Checksums | None = None,
) -> np.ndarray:
    """Cuts tiles out of a level, decoding each stored tile once, and says which of them are valid, bool (N,).

    Args:
        file: descriptor of the open slide.
        corners: top-left corners in pixels of the level; what lies outside of it is white.
        source: width and height of a tile in pixels of the level.
        out: for each tile an array uint8 (h, w, 3); a tile is resampled when its size is not `source`.
        checksums: of the stored tiles, when they were looked at before.

    A tile is invalid when a stored tile that it needs cannot be decoded; its pixels are 0.
    """
    width, height = level.tile
    touching: dict[tuple[int, int], list[int]] = defaultdict(list)
    missing = [0] * len(corners)  # stored tiles that a tile still waits for
    valid = np.ones(len(corners), bool)
    for i, (x, y) in enumerate(corners):
        columns = range(max(0, x // width), min(level.columns, -(-(x + source[0]) // width)))
        rows = range(max(0, y // height), min(level.rows, -(-(y + source[1]) // height)))
        missing[i] = len(columns) * len(rows)
        if x < 0 or y < 0 or x + source[0] > level.size[0] or y + source[1] > level.size[1]:
            out[i].fill(WHITE)
        for row in rows:
            for column in columns:
                touching[row, column].append(i)

    canvases: dict[int, np.ndarray] = {}  # of the tiles that are being put together, at the level's resolution
    spare: list[np.ndarray] = []
    pixels = np.empty((height, width, 3), np.uint8)
    for (row, column), members in sorted(touching.items()):
        left, top = column * width, row * height
        whole = len(members) == 1 and _fills(out[members[0]], level, (left, top), corners[members[0]], source)
        decoded = level.decodes(file, column, row, out[members[0]] if whole else pixels, checksums)
        for i in members:
            if i not in canvases:
                canvases[i] = _canvas(out[i], source, spare, inside=_is_inside(corners[i], source, level.size))
            valid[i] &= decoded
            if decoded and not whole:
                _copy(pixels, (left, top), canvases[i], corners[i], level.size)
            missing[i] -= 1
            if missing[i] == 0:
                canvas = canvases.pop(i)
                if canvas is not out[i]:
                    resample(canvas, out[i])
                    spare.append(canvas)
                if not valid[i]:
                    out[i].fill(0)
    return valid


def resample(pixels: np.ndarray, out: np.ndarray) -> None:
    """Resamples `pixels`, uint8 (h, w, 3), to the size of `out`, and writes them there.

    An output pixel is the mean of the light over the area that it covers (exact also for fractional areas), which is
    what a coarser sensor would have seen; a level made so from another gives the same pixels as the other. Along an axis
    on which `out` is finer than `pixels` there is nothing to average, and bicubic interpolation is used.
    """
    height, width = out.shape[:2]
    smaller = min(width, pixels.shape[1]), min(height, pixels.shape[0])
    if smaller != pixels.shape[1::-1]:
        pixels = cv2.resize(
            pixels, smaller, dst=out if smaller == (width, height) else None, interpolation=cv2.INTER_AREA
        )
    if smaller != (width, height):
        pixels = cv2.resize(pixels, (width, height), dst=out, interpolation=cv2.INTER_CUBIC)
    if pixels is not out:
        np.copyto(out, pixels)


def _is_inside(corner: tuple[int, int], source: tuple[int, int], size: tuple[int, int]) -> bool:
    return min(corner) >= 0 and corner[0] + source[0] <= size[0] and corner[1] + source[1] <= size[1]


def _fills(
    out: np.ndarray, level: StoredLevel, place: tuple[int, int], corner: tuple[int, int], source: tuple[int, int]
) -> bool:
    """Whether the stored tile at `place` is, pixel for pixel, the tile at `corner`."""
    return (
        place == corner
        and level.tile == source
        and out.shape[1::-1] == source
        and _is_inside(corner, source, level.size)
        and out.flags.c_contiguous
    )


def _canvas(out: np.ndarray, source: tuple[int, int], spare: list[np.ndarray], inside: bool) -> np.ndarray:
    """Where a tile is put together: `out` itself when it needs no resampling."""
    if out.shape[1::-1] == source:
        return out
    canvas = spare.pop() if spare else np.empty((source[1], source[0], 3), np.uint8)
    if not inside:
        canvas.fill(WHITE)
    return canvas


def _copy(
    pixels: np.ndarray, place: tuple[int, int], canvas: np.ndarray, corner: tuple[int, int], size: tuple[int, int]
) -> None:
    """Copies what the stored tile at `place` and the canvas at `corner` have in common, within a level of `size`."""
    x0, y0 = max(place[0], corner[0]), max(place[1], corner[1])
    x1 = min(place[0] + pixels.shape[1], corner[0] + canvas.shape[1], size[0])
    y1 = min(place[1] + pixels.shape[0], corner[1] + canvas.shape[0], size[1])
    canvas[y0 - corner[1] : y1 - corner[1], x0 - corner[0] : x1 - corner[0]] = pixels[
        y0 - place[1] : y1 - place[1], x0 - place[0] : x1 - place[0]
    ]
