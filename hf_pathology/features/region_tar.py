"""Images of regions in a tar, as HIPT keeps them (`tar_patch_4096/<slide>.tar`, a webdataset): read and written as a stream.

Nothing is ever unpacked to the disk: a member's name only gives the region's key, and its bytes are decoded in memory.
"""

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..atomic import atomic_path
from ..errors import UserError
from ..slides.foreign import naming_read_errors


FORMATS = ("PNG", "JPEG", "PPM", "TIFF", "WEBP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".ppm", ".tif", ".tiff", ".webp", ".image"}
MAX_PIXELS = 1 << 26  # of one region: HIPT's have 2^24
MAX_BYTES = 1 << 30  # of one member


def iterate_region_tar(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """The key and the pixels, uint8 (h, w, 3), of every image in the tar, one at a time.

    The key is the member's name up to the first dot, as webdataset has it; members that are no images are passed over.
    Raises UserError when the tar or an image is damaged, or an image is absurdly large.
    """
    with naming_read_errors(path, "tar"), tarfile.open(path, "r:") as tar:
        require_end(path)
        for member in tar:
            name = PurePosixPath(member.name).name
            if member.isreg() and PurePosixPath(name).suffix.lower() in SUFFIXES:
                if member.size > MAX_BYTES:
                    raise UserError(f"{path} has a member of {member.size} bytes: it holds no images of regions")
                yield name.split(".")[0], decode(path, name, tar.extractfile(member).read())


def require_end(path: str | Path) -> None:
    """Raises UserError unless the tar ends with two empty blocks; without them, regions at the end may be missing."""
    with open(path, "rb") as file:
        file.seek(-2 * tarfile.BLOCKSIZE, io.SEEK_END)
        if any(file.read()):
            raise UserError(f"{path} does not end as a tar does: it is truncated, copy it again")


def decode(path: str | Path, name: str, content: bytes) -> np.ndarray:
    """The pixels of one image, uint8 (h, w, 3)."""
    with naming_read_errors(path, f"tar with the image {name!r}"):
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise UserError(f"{path} has an image {name!r} that is no region: {error}") from error
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"{path} has an image {name!r} of {image.width}x{image.height} pixels: it holds no regions"
            )
        return np.array(image.convert("RGB"))


def write_region_tar(path: str | Path, items: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes regions, pairs of a key and uint8 (h, w, 3), as PNG; the tar is whole or absent, and the same each time.

    Raises UserError for a key that webdataset would not give back: empty, twice, or with a dot or a slash.
    """
    keys = set()
    with atomic_path(path) as partial, tarfile.open(partial, "w") as tar:
        for key, pixels in items:
            if key in keys or not re.fullmatch(r"[^./\\\x00]+", key):
                raise UserError(f"{path} cannot have a region called {key!r}: a key is unique, without dot or slash")
            keys.add(key)
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, format="PNG")
            member = tarfile.TarInfo(f"{key}.png")
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)
