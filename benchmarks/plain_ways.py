"""How tiles are usually read: what `reading.py` measures against (written from descriptions of the tools, not from their code).

    python benchmarks/reading.py SLIDES

A way is called with `Work` and is endless: it yields how many tiles it has just made ready to use. Decoding the stored
tiles and nothing else is the limit that no reader of the same pixels passes.
"""

import ctypes
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import simplejpeg
import tifffile
import torch
from openslide import lowlevel
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
START = b"\xff\xd8"
ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # says that the colours are not YCbCr
STORED_TILES = 2000  # that are decoded again and again


@dataclass(frozen=True)
class Work:
    """What is read again and again.

    Attributes:
        path: of the slide.
        xy: int64 (N, 2), corners of the tiles in level-0 pixels, in the order in which they are read one by one.
        blocks: int64 (n, 2) each, the same corners, as neighbours that are read together.
        size: edge of a tile in output pixels; `extent` is it in level-0 pixels.
    """

    path: Path
    xy: np.ndarray
    blocks: list[np.ndarray]
    size: int
    extent: int


def openslide_pillow(work: Work) -> Iterator[int]:
    """OpenSlide's `read_region`, Pillow's `convert` and, where the size differs, its bicubic `resize`; the plain way."""
    with openslide.OpenSlide(work.path) as slide:
        for corner in itertools.cycle(work.xy.tolist()):
            np.asarray(read_pillow(slide, corner, work))
            yield 1


def openslide_raw(work: Work) -> Iterator[int]:
    """OpenSlide alone: its premultiplied BGRA in one buffer, neither converted nor resized."""
    with openslide.OpenSlide(work.path) as slide:
        level, stored = stored_level(slide, work)
        buffer = (stored * stored * ctypes.c_uint32)()
        for x, y in itertools.cycle(work.xy.tolist()):
            lowlevel._read_region(slide._osr, buffer, x, y, level, stored, stored)  # what read_region itself calls
            yield 1


def clam_items(work: Work) -> Iterator[int]:
    """The items of CLAM: Pillow, `Resize`, `ToTensor`, `Normalize`, float32 (3, size, size)."""
    items = ClamItems(work)
    for item in itertools.cycle(range(len(items))):
        items[item]
        yield 1


def clam_loader(work: Work) -> Iterator[int]:
    """The items of CLAM in batches from a DataLoader of two worker processes."""
    yield from loaded(ClamItems(work))


def trident_items(work: Work) -> Iterator[int]:
    """The items of TRIDENT before its encoder's own transforms: Pillow, numpy uint8 (size, size, 3)."""
    items = TridentItems(work)
    for item in itertools.cycle(range(len(items))):
        items[item]
        yield 1


def trident_loader(work: Work) -> Iterator[int]:
    """The items of TRIDENT in batches from a DataLoader of two worker processes."""
    yield from loaded(TridentItems(work))


def bare_decode(work: Work, threads: int = 1) -> Iterator[float]:
    """Nothing but decoding stored tiles of level 0, in each thread into one buffer; as many tiles as their area makes.

    Raises ValueError for a slide that is no tiled TIFF.
    """
    decode, tiles, edge = stored_tiles(work.path)
    parts = [tiles[start : start + BATCH] for start in range(0, len(tiles), BATCH)]
    buffers = [np.empty((edge, edge, 3), np.uint8) for _ in range(threads)]

    def decode_part(part: list[bytes], buffer: np.ndarray) -> int:
        for tile in part:
            decode(tile, buffer)
        return len(part)

    with ThreadPoolExecutor(threads) as pool:
        for first in itertools.cycle(range(0, len(parts), threads)):
            decoded = sum(pool.map(decode_part, parts[first : first + threads], buffers))
            yield decoded * edge**2 / work.extent**2


def stored_level(slide: openslide.OpenSlide, work: Work) -> tuple[int, int]:
    """The coarsest level that is fine enough, and the edge of a tile in its pixels."""
    level = slide.get_best_level_for_downsample(work.extent / work.size)
    return level, round(work.extent / slide.level_downsamples[level])


def read_pillow(slide: openslide.OpenSlide, corner: list[int], work: Work) -> Image.Image:
    """A tile as RGB picture of the size asked for."""
    level, stored = stored_level(slide, work)
    image = slide.read_region(corner, level, (stored, stored)).convert("RGB")
    return image if stored == work.size else image.resize((work.size, work.size), Image.Resampling.BICUBIC)


class TridentItems(Dataset):
    """Tiles as uint8 (size, size, 3), from a slide that each worker process opens for itself."""

    def __init__(self, work: Work):
        self.work, self.xy, self.slide = work, work.xy.tolist(), None

    def __len__(self) -> int:
        return len(self.xy)

    def __getitem__(self, item: int) -> np.ndarray:
        self.slide = self.slide or openslide.OpenSlide(self.work.path)
        return np.array(read_pillow(self.slide, self.xy[item], self.work))


class ClamItems(TridentItems):
    """Tiles as normalised float32 (3, size, size)."""

    def __init__(self, work: Work):
        super().__init__(work)
        resize = [] if work.extent == work.size else [transforms.Resize((work.size, work.size))]
        self.transform = transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __getitem__(self, item: int) -> torch.Tensor:
        self.slide = self.slide or openslide.OpenSlide(self.work.path)
        level, stored = stored_level(self.slide, self.work)
        return self.transform(self.slide.read_region(self.xy[item], level, (stored, stored)).convert("RGB"))


def loaded(items: Dataset, workers: int = 2) -> Iterator[int]:
    """The sizes of the batches of a DataLoader that goes through `items` again and again."""
    endless = itertools.cycle(range(len(items)))
    for batch in DataLoader(items, BATCH, sampler=endless, num_workers=workers, multiprocessing_context="fork"):
        yield len(batch)


def stored_tiles(path: Path) -> tuple[Callable[[bytes, np.ndarray], None], list[bytes], int]:
    """What decodes a stored tile into a buffer, some stored tiles of level 0 in random order, and their edge in pixels.

    Raises ValueError for a slide that is no TIFF of square tiles.
    """
    if not is_tiff(path):
        raise ValueError(f"{path} is no TIFF: its stored tiles cannot be decoded without OpenSlide")
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        header = page.jpegtables[:-2] if page.jpegtables else START
        if page.photometric == tifffile.PHOTOMETRIC.RGB:
            header = START + ADOBE_RGB + header[2:]
        chosen = np.random.default_rng(0).permutation(len(page.dataoffsets))[:STORED_TILES]
        tiles = []
        for number in chosen:
            file.filehandle.seek(page.dataoffsets[number])
            tiles.append(file.filehandle.read(page.databytecounts[number]))
        if page.compression == tifffile.COMPRESSION.JPEG:
            tiles = [header + tile[2:] for tile in tiles]
        return DECODERS[page.compression.name], tiles, page.tilewidth


def is_tiff(path: Path) -> bool:
    """Whether the file begins as a TIFF does."""
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def decode_jpeg(tile: bytes, buffer: np.ndarray) -> None:
    simplejpeg.decode_jpeg(tile, "RGB", buffer=buffer)


def decode_jpeg2000(tile: bytes, buffer: np.ndarray) -> None:  # YCbCr stays YCbCr
    imagecodecs.jpeg2k_decode(tile, out=buffer)


def decode_lzw(tile: bytes, buffer: np.ndarray) -> None:
    imagecodecs.lzw_decode(tile, out=buffer.reshape(-1))


def decode_deflate(tile: bytes, buffer: np.ndarray) -> None:
    imagecodecs.zlib_decode(tile, out=buffer.reshape(-1))


DECODERS = {
    "JPEG": decode_jpeg,
    "APERIO_JP2000_RGB": decode_jpeg2000,
    "APERIO_JP2000_YCBC": decode_jpeg2000,
    "LZW": decode_lzw,
    "ADOBE_DEFLATE": decode_deflate,
}
