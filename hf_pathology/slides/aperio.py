"""Writes a pyramid of JPEG tiles that OpenSlide takes for an Aperio slide (.svs)."""

from pathlib import Path

import cv2
import numpy as np
import tifffile

from ..atomic import atomic_path


def write_aperio(
    path: str | Path,
    image: np.ndarray,
    mpp: float | None,
    *,
    tile: int = 256,
    quality: int = 80,
    downsamples: tuple[int, ...] = (1, 4, 16),
    app_mag: int = 20,
) -> None:
    """Writes `image` (uint8 RGB (h, w, 3)) to `path`, whole or not at all.

    Args:
        mpp: microns per pixel of `image`; None writes a slide that declares no resolution.
        tile: edge of a stored tile in pixels, a multiple of 16.
        quality: of the JPEG, 1 to 100; the colours are stored at half resolution (4:2:0), as scanners do.
        downsamples: of the levels, the first being 1; those on which the longer edge would be less than a tile are left
            out. `(1,)` writes one level.
        app_mag: the nominal magnification, which nothing here relies on.

    The layout is Aperio's: level 0, a stripped thumbnail, the further levels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an Aperio slide is made from uint8 (h, w, 3), not from {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    resolution = "" if mpp is None else f"|MPP = {mpp:.4f}"
    head, tail = "Aperio Image Library v12.0.15 \r\n", f"|AppMag = {app_mag}{resolution}"
    codec = {
        "photometric": "rgb",  # of the input: the JPEG itself is YCbCr
        "compression": "jpeg",
        "compressionargs": {"level": quality},
        "subsampling": (2, 2),
        "metadata": None,
        "software": False,
        "maxworkers": 1,
    }
    level_0 = f"{width}x{height} [0,0 {width}x{height}] ({tile}x{tile}) JPEG/RGB Q={quality}"
    with atomic_path(path) as partial, tifffile.TiffWriter(partial) as writer:
        writer.write(image, tile=(tile, tile), description=f"{head}{level_0}{tail}", **codec)
        thumbnail = shrink(image, max(1, max(width, height) // 768))
        size = f"{thumbnail.shape[1]}x{thumbnail.shape[0]}"
        writer.write(thumbnail, rowsperstrip=16, description=f"{head}{width}x{height} -> {size} - {tail}", **codec)
        for downsample in downsamples[1:]:
            if max(width, height) // downsample < tile:
                break
            level = shrink(image, downsample)
            size = f"{level.shape[1]}x{level.shape[0]}"
            description = f"{head}{level_0} -> {size} JPEG/RGB Q={quality}"
            writer.write(level, tile=(tile, tile), description=description, **codec)


def shrink(image: np.ndarray, downsample: int) -> np.ndarray:
    """`image` (h, w, 3) averaged over boxes of `downsample` pixels, the incomplete last row and column dropped."""
    height, width = (max(1, edge // downsample) for edge in image.shape[:2])
    whole = image[: height * downsample, : width * downsample]
    return cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
