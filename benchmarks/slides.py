"""Writes slides to measure with: H&E-like pyramids with as many bytes to a tile as scanners write, in their dialects.

    python benchmarks/slides.py SLIDES
    python benchmarks/slides.py SLIDES --only aperio-240-420 huge
    python benchmarks/slides.py SLIDES --cohort 10000

The default folder is `hf_pathology_slides` in the folder for temporary files. What is there already is not written again;
each slide is then opened with OpenSlide, and a line says what was found. All takes about a minute, 0.7 GB of disk and 3 GB of memory.

One field of tissue is drawn, and mirrored copies of varied brightness are laid side by side. `huge.svs` is a slide of
100,000 by 80,000 pixels whose tissue is made of a few hundred stored tiles, to which its arrays of offsets point again and
again. `--cohort` makes many slides under many names, in folders in folders, of a few small files.
"""

import argparse
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import openslide
import simplejpeg
import tifffile

from hf_pathology.atomic import atomic_path
from hf_pathology.slides import histology
from hf_pathology.slides.aperio import shrink, write_aperio
from hf_pathology.slides.nests import LABELS, place_nests
from hf_pathology.slides.synthetic import draw_slide


MPP = 0.25
FIELD = 3072  # pixels, a multiple of all stored tiles but those of 240
GRAIN = 0.34  # of the stain: the tiles then have the bytes of those of scanners, 10 to 33 kB
LEVELS = (1, 4, 16)
JPEG, JPEG2000_YCBCR, JPEG2000_RGB, LZW, DEFLATE = 7, 33003, 33005, 5, 8  # as TIFF numbers them
LARGE, SMALL = (20_000, 15_000), (6_144, 4_608)
HUGE, HUGE_LEVELS = (100_000, 80_000), (4, 16, 64)  # the levels below the first
COHORT_ORIGINALS = 4


@dataclass(frozen=True)
class Dialect:
    """How a slide stores its pixels.

    Attributes:
        vendor: as OpenSlide calls it, "aperio" or "generic-tiff".
        tile: edge of a stored tile in pixels.
        compression: of the tiles, TIFF's number.
        quality: of the JPEG, 1 to 100, or of the JPEG2000 as its signal-to-noise ratio in dB.
        subsampling: of a JPEG's colours, "420" or "422"; "rgb" stores red, green and blue as they are.
        size: width and height of level 0 in pixels.
    """

    vendor: str
    tile: int
    compression: int = JPEG
    quality: int = 0
    subsampling: str = ""
    size: tuple[int, int] = LARGE

    @property
    def suffix(self) -> str:
        return ".svs" if self.vendor == "aperio" else ".tif"


DIALECTS = {
    "aperio-240-420": Dialect("aperio", 240, quality=70, subsampling="420"),
    "aperio-256-420": Dialect("aperio", 256, quality=75, subsampling="420"),
    "aperio-256-422": Dialect("aperio", 256, quality=80, subsampling="422"),
    "aperio-256-rgb": Dialect("aperio", 256, quality=70, subsampling="rgb"),
    "generic-512-420": Dialect("generic-tiff", 512, quality=80, subsampling="420"),
    "aperio-j2k-rgb": Dialect("aperio", 256, JPEG2000_RGB, quality=36, size=SMALL),
    "aperio-j2k-ycbcr": Dialect("aperio", 256, JPEG2000_YCBCR, quality=40, size=SMALL),
    "generic-lzw": Dialect("generic-tiff", 256, LZW, size=SMALL),
    "generic-deflate": Dialect("generic-tiff", 256, DEFLATE, size=SMALL),
}


def slide_path(folder: Path, name: str) -> Path:
    """Where the slide of the dialect `name` lies in `folder`."""
    return folder / f"{name}{DIALECTS[name].suffix}"


def draw_field(seed: int = 0) -> np.ndarray:
    """A square of tissue without an edge at 0.25 mpp, uint8 RGB (FIELD, FIELD, 3)."""
    outline_rng, stain_rng, colour_rng, glass_rng = (np.random.default_rng([seed, stream]) for stream in range(4))
    size = FIELD // 2  # what draws tissue does so at 0.5 mpp
    tissue, depth = np.ones((size, size), bool), np.full((size, size), 255, np.uint8)
    pattern = histology.draw_pattern(outline_rng, tissue, 0.45)
    nests = place_nests(outline_rng, depth, pattern, LABELS[0], 0.9)
    stains = histology.stain_tissue(stain_rng, tissue, depth, pattern, nests)
    grain = 1 + np.float32(GRAIN) * histology.smooth_noise(stain_rng, FIELD, 2)
    stains = (cv2.resize(stain, (FIELD, FIELD), interpolation=cv2.INTER_CUBIC) * grain for stain in stains)
    return histology.render(colour_rng, glass_rng, *stains)


def lay_copies(field: np.ndarray, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Mirrored copies of `field` of varied brightness, uint8 (h, w, 3) for the `size` (width, height)."""
    rng = np.random.default_rng(seed)
    image = np.empty((size[1], size[0], 3), np.uint8)
    for row, y in enumerate(range(0, size[1], len(field))):
        for column, x in enumerate(range(0, size[0], len(field))):
            room = image[y : y + len(field), x : x + len(field)]
            copy = np.ascontiguousarray(field[:: (-1) ** row, :: (-1) ** column])
            room[:] = cv2.convertScaleAbs(copy, alpha=rng.uniform(0.92, 1.0))[: room.shape[0], : room.shape[1]]
    return image


def write_slide(path: Path, dialect: Dialect, image: np.ndarray) -> None:
    """Writes `image`, uint8 (h, w, 3), as a pyramid of the `dialect`, whole or not at all."""
    with atomic_path(path) as partial, tifffile.TiffWriter(partial) as writer:
        for downsample in LEVELS:
            level = image if downsample == 1 else shrink(image, downsample)
            write_level(
                writer, dialect, level.shape, map(encoder(dialect), cut(level, dialect.tile)), image.shape, downsample
            )
            if downsample == 1 and dialect.vendor == "aperio":
                write_thumbnail(writer, dialect, shrink(image, 32), image.shape)


def write_level(
    writer: tifffile.TiffWriter,
    dialect: Dialect,
    shape: tuple[int, ...],
    tiles: Iterable[bytes],
    full: tuple[int, ...],
    downsample: int,
) -> None:
    """Writes one level of a pyramid from its encoded tiles, row by row.

    Args:
        shape: (h, w, 3) of the level; `full` is that of level 0.
        tiles: b"" leaves a tile out of the file.
    """
    options = {"compression": dialect.compression, "photometric": "rgb", "metadata": None, "software": False}
    if dialect.compression == JPEG:
        options["jpegtables"] = abbreviated(encode_jpeg(np.zeros((16, 16, 3), np.uint8), dialect))[0]
        if dialect.subsampling != "rgb":
            options |= {"photometric": "ycbcr", "subsampling": {"420": (2, 2), "422": (2, 1)}[dialect.subsampling]}
    if dialect.vendor == "aperio":
        options["description"] = describe(dialect, full, shape if downsample > 1 else None)
    else:
        per_cm = 10_000 / MPP / downsample
        options |= {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER", "subfiletype": int(downsample > 1)}
    writer.write(tiles, shape=shape, dtype=np.uint8, tile=(dialect.tile, dialect.tile), **options)


def write_thumbnail(
    writer: tifffile.TiffWriter, dialect: Dialect, thumbnail: np.ndarray, full: tuple[int, ...]
) -> None:
    """Writes the stripped picture that follows level 0 of an Aperio slide."""
    options = {"compression": "jpeg", "photometric": "rgb", "metadata": None, "software": False, "maxworkers": 1}
    writer.write(thumbnail, rowsperstrip=16, description=describe(dialect, full, thumbnail.shape), **options)


def describe(dialect: Dialect, full: tuple[int, ...], level: tuple[int, ...] | None) -> str:
    """Aperio's description of the picture of shape `level`, or of level 0 (of shape `full`) when None."""
    height, width = full[:2]
    text = f"Aperio Image Library v12.0.15 \r\n{width}x{height} [0,0 {width}x{height}] ({dialect.tile}x{dialect.tile})"
    text += f" -> {level[1]}x{level[0]}" if level else ""
    codec = "JPEG/RGB" if dialect.compression == JPEG else "J2K/KDU"
    return f"{text} {codec} Q={dialect.quality}|AppMag = 40|MPP = {MPP:.4f}"


def cut(image: np.ndarray, edge: int) -> Iterator[np.ndarray]:
    """The tiles of `image` row by row, uint8 (edge, edge, 3), the last ones filled up with their last pixels."""
    for y in range(0, image.shape[0], edge):
        for x in range(0, image.shape[1], edge):
            tile = image[y : y + edge, x : x + edge]
            missing = [(0, edge - tile.shape[0]), (0, edge - tile.shape[1]), (0, 0)]
            yield np.pad(tile, missing, mode="edge") if tile.shape[:2] != (edge, edge) else np.ascontiguousarray(tile)


def encoder(dialect: Dialect) -> Callable[[np.ndarray], bytes]:
    """What turns a tile, uint8 (edge, edge, 3), into the bytes that the file stores."""
    if dialect.compression == JPEG:
        return lambda tile: abbreviated(encode_jpeg(tile, dialect))[1]
    if dialect.compression == JPEG2000_RGB:
        return lambda tile: imagecodecs.jpeg2k_encode(tile, dialect.quality, codecformat="j2k")
    if dialect.compression == JPEG2000_YCBCR:
        return lambda tile: imagecodecs.jpeg2k_encode(to_ycbcr(tile), dialect.quality, codecformat="j2k", mct=False)
    if dialect.compression == LZW:
        return imagecodecs.lzw_encode
    return lambda tile: zlib.compress(tile.tobytes())


def to_ycbcr(tile: np.ndarray) -> np.ndarray:
    """The colours of an RGB `tile` as JPEG's YCbCr; OpenCV has the two differences in the other order."""
    return np.ascontiguousarray(cv2.cvtColor(tile, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])


def encode_jpeg(tile: np.ndarray, dialect: Dialect) -> bytes:
    """A whole JPEG stream of `tile`, all of the same tables."""
    if dialect.subsampling == "rgb":
        return imagecodecs.jpeg8_encode(tile, dialect.quality, colorspace="rgb", outcolorspace="rgb")
    return simplejpeg.encode_jpeg(tile, dialect.quality, "RGB", dialect.subsampling)


def abbreviated(jpeg: bytes) -> tuple[bytes, bytes]:
    """The tables of a JPEG stream, and the stream without them, as TIFF stores both.

    Application markers are left out, and components that are called R, G and B are called 0, 1 and 2, as Aperio does.
    """
    start, end = b"\xff\xd8", b"\xff\xd9"
    tables, stream, place = start, start, 2
    while True:
        marker, length = jpeg[place + 1], int.from_bytes(jpeg[place + 2 : place + 4], "big")
        segment, place = bytearray(jpeg[place : place + 2 + length]), place + 2 + length
        if marker in (0xDB, 0xC4):
            tables += segment
        elif marker in (0xC0, 0xDA):
            first, step = (10, 3) if marker == 0xC0 else (5, 2)
            for number, at in enumerate(range(first, first + 3 * step, step)):
                segment[at] = number if segment[at] == ord("RGB"[number]) else segment[at]
            stream += segment
        if marker == 0xDA:  # the coded pixels follow
            return tables + end, stream + jpeg[place:]


def write_huge(path: Path, field: np.ndarray) -> None:
    """Writes an Aperio slide of 100,000 x 80,000 pixels with ragged tissue on glass, whole or not at all."""
    dialect = DIALECTS["aperio-256-420"]
    encode, edge, full = encoder(dialect), dialect.tile, (HUGE[1], HUGE[0], 3)
    rows, columns = -(-HUGE[1] // edge), -(-HUGE[0] // edge)
    outline = histology.draw_outline(np.random.default_rng(5), 8 * columns).astype(np.float32)
    tissue = cv2.resize(outline, (columns, rows), interpolation=cv2.INTER_AREA) > 0.5  # of each stored tile
    mirrored = lay_copies(field, (2 * FIELD, 2 * FIELD))
    nothing = np.zeros((edge, edge), np.float32)
    glass = histology.render(np.random.default_rng(0), np.random.default_rng(1), nothing, nothing)
    stored = [encode(tile) for tile in (glass, *cut(mirrored, edge))]
    period = 2 * FIELD // edge
    row, column = np.indices(tissue.shape)
    used = np.where(tissue, 1 + row % period * period + column % period, 0)  # which of `stored` each tile is
    with atomic_path(path) as partial:
        with tifffile.TiffWriter(partial) as writer:
            write_level(writer, dialect, full, (b"" for _ in range(used.size)), full, 1)
            levels = list(shrink_huge(mirrored, glass, tissue, edge))
            write_thumbnail(writer, dialect, levels[-1], full)
            for level, downsample in zip(levels, HUGE_LEVELS):
                write_level(writer, dialect, level.shape, map(encode, cut(level, edge)), full, downsample)
        with open(partial, "ab") as file:
            offsets = [(file.tell(), file.write(tile))[0] for tile in stored]
        with tifffile.TiffFile(partial, mode="r+") as file:
            tags = file.pages[0].tags
            tags["TileOffsets"].overwrite([offsets[number] for number in used.ravel()])
            tags["TileByteCounts"].overwrite([len(stored[number]) for number in used.ravel()])


def shrink_huge(mirrored: np.ndarray, glass: np.ndarray, tissue: np.ndarray, edge: int) -> Iterator[np.ndarray]:
    """The levels below the first: `mirrored` again and again where `tissue` is True for a stored tile, else `glass`."""
    downsample = HUGE_LEVELS[0]
    width, height = (length // downsample for length in HUGE)
    part = shrink(mirrored, downsample)
    level = np.tile(part, (-(-height // len(part)), -(-width // len(part)), 1))[:height, :width]
    clear = shrink(glass, downsample)
    for row, column in np.argwhere(~tissue) * (edge // downsample):
        room = level[row : row + len(clear), column : column + len(clear)]
        room[:] = clear[: room.shape[0], : room.shape[1]]
    yield level
    for finer, coarser in zip(HUGE_LEVELS, HUGE_LEVELS[1:]):
        level = shrink(level, coarser // finer)
        yield level


def cohort(folder: Path, count: int, size: int = 1024) -> list[Path]:
    """The paths of `count` slides in folders in `folder`: four small ones, and further names (hard links) of these."""
    paths = [folder / f"site_{i % 7}" / f"case_{i // 3:05d}" / f"slide_{i:06d}.svs" for i in range(count)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            continue
        if number < COHORT_ORIGINALS:
            write_aperio(path, draw_slide(number, LABELS[number % 2], size)[0], 0.5)
        else:
            os.link(paths[number % COHORT_ORIGINALS], path)
    return paths


def check(path: Path, vendor: str) -> str:
    """A row of a table about the slide, as OpenSlide sees it. Raises RuntimeError when it is not what was meant."""
    with openslide.OpenSlide(path) as slide, tifffile.TiffFile(path) as file:
        if slide.properties["openslide.vendor"] != vendor or float(slide.properties["openslide.mpp-x"]) != MPP:
            raise RuntimeError(f"OpenSlide takes {path} for another slide: {dict(slide.properties)}")
        for level, (width, height) in enumerate(slide.level_dimensions):
            downsample = round(slide.level_downsamples[level])
            slide.read_region((width // 2 * downsample, height // 2 * downsample), level, (300, 300))
        levels = ", ".join(f"{width} x {height}" for width, height in slide.level_dimensions)
        counts = file.pages[0].databytecounts
    return f"| {path.name} | {vendor} | {levels} | {np.mean(counts) / 1e3:.1f} | {path.stat().st_size / 1e6:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*DIALECTS, "huge"]
    parser.add_argument("folder", type=Path, nargs="?", default=Path(tempfile.gettempdir()) / "hf_pathology_slides")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--cohort", type=int, metavar="N", help="instead, write N small slides into FOLDER/cohort")
    options = parser.parse_args()
    if options.cohort:
        print(f"{len(cohort(options.folder / 'cohort', options.cohort))} slides in {options.folder / 'cohort'}")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    field = draw_field()
    image = lay_copies(field, LARGE)
    print("| slide | vendor | levels | kB/tile | MB |\n|---|---|---|---|---|")
    for name in options.only:
        path = options.folder / "huge.svs" if name == "huge" else slide_path(options.folder, name)
        dialect = DIALECTS.get(name, DIALECTS["aperio-256-420"])
        if not path.is_file():
            if name == "huge":
                write_huge(path, field)
            else:
                write_slide(path, dialect, image[: dialect.size[1], : dialect.size[0]])
        print(check(path, dialect.vendor), flush=True)


if __name__ == "__main__":
    main()
