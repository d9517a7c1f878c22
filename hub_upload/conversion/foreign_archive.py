"""Archives of checkpoints, as they are downloaded from shared drives: unpacked where they can do no harm."""

import bz2
import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.conversion.foreign_pickle import require_size


MAX_MEMBERS = 10_000
MAX_HEADER = 2**20  # bytes of a member's name and attributes
LEGACY_MEMBERS = {"storages", "tensors", "pickle"}  # what torch wrote into tar files before version 0.1.10


@contextmanager
def unpacked(path: Path, max_bytes: int) -> Iterator[Path]:
    """A temporary folder with the files of the archive `path` (.zip, .tar, .tar.gz, .tar.xz ...).

    Raises UserError when it is damaged, holds more than `max_bytes`, which is counted before anything is written, or has a
    member that is no plain file within it: a link, a device, an absolute path or one with "..".
    """
    with TemporaryDirectory(prefix="hf_pathology_") as folder:
        try:
            unpack(path, Path(folder), max_bytes)
        except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            raise UserError(f"{path} is damaged, or cannot be unpacked: fetch it again ({error})") from error
        except (RuntimeError, NotImplementedError) as error:  # what zipfile says of passwords and rare compressions
            raise UserError(f"{path} cannot be unpacked: unpack it yourself, and pass the checkpoint") from error
        yield Path(folder)


def unpack(path: Path, folder: Path, max_bytes: int) -> None:
    """Writes the files of the archive `path` below `folder`; see `unpacked`."""
    total = 0
    members = zip_members(path) if zipfile.is_zipfile(path) else tar_members(path)
    for number, (name, size, source) in enumerate(members):
        total += size
        require_size(path, total, max_bytes)
        if number >= MAX_MEMBERS:
            raise UserError(f"{path} has more than {MAX_MEMBERS} files: unpack it yourself, and pass the checkpoint")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as file:
            shutil.copyfileobj(source, file)


def zip_members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, declared size and content of the files in a zip; sizes are counted by whoever asks, before the content is read."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"{path} holds the link {member.filename}: it is not unpacked")
            require_plain_name(path, member.filename)
            if not member.is_dir():
                with archive.open(member) as content:
                    yield member.filename, member.file_size, content


def tar_members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and content of the files in a tar, compressed or not."""
    with open_stream(path) as stream, tarfile.open(fileobj=BoundedReads(stream), mode="r:") as archive:
        for member in archive:
            if not member.isfile() and not member.isdir():
                raise UserError(f"{path} holds {member.name}, which is a link or no file: it is not unpacked")
            require_plain_name(path, member.name)
            if member.name in LEGACY_MEMBERS:
                raise UserError(
                    f"{path} was written by torch before 0.1.10, which is not read: load it where you trust it, and "
                    "save its weights again"
                )
            if member.isfile():
                with archive.extractfile(member) as content:
                    yield member.name, member.size, content


def open_stream(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed where it is compressed."""
    with open(path, "rb") as file:
        start = file.read(6)
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
    return next((opener for magic, opener in openers.items() if start.startswith(magic)), open)(path, "rb")


class BoundedReads:
    """A stream of which `tarfile` reads a header at once only if it is small; contents are read in small parts anyway."""

    def __init__(self, stream: IO[bytes]):
        self.seek, self.tell, self.stream = stream.seek, stream.tell, stream

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.stream.read(size)


def require_plain_name(path: Path, name: str) -> None:
    """Raises UserError when the member `name` of `path` would be written outside of the folder it is unpacked to."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0] or "\0" in name:
        raise UserError(f"{path} holds {name!r}, which leads out of the folder it is unpacked to: it is not unpacked")
