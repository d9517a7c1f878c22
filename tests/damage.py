"""Damages slides as disks and transfers do."""

from pathlib import Path

import tifffile


def spoil_tiles(path: Path, *numbers: int) -> None:
    """Overwrites the beginning of these stored tiles of level 0, so that no decoder takes them for JPEG."""
    with tifffile.TiffFile(path) as tiff:
        offsets = [tiff.pages[0].dataoffsets[number] for number in numbers]
    with open(path, "r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(b"\x00" * 64)
