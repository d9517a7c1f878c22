"""Tiles in a tar as WebDataset writes it, read in runs of 64 samples.

A sample is a row of members whose names differ only in their endings. Where the runs begin is found in one pass over the
headers and kept beside the tar in a small file. The index of a local tar is made anew when the tar is younger or has another
size, and when the index is damaged; what is read by it is read with its headers, so that a wrong index cannot go unseen.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import BinaryIO

import numpy as np

from ..atomic import atomic_path
from ..errors import UserError
from .shard_files import EXACTLY, LocalFiles, ShardFiles
from .shard_formats import GROUP_TILES, ShardRows


IMAGES, FACTS = ("jpg", "jpeg"), "json"
MAX_FACTS = 1 << 20  # bytes of one JSON


class TarShard:
    """A tar of tiles with its index.

    Attributes:
        blocks: how many runs of 64 samples it has; the last may be shorter.
        tiles: how many samples.
        size, mpp: edge of a tile in pixels and the resolution asked for, as its first tile says; 0 when there is none.
    """

    def __init__(self, files: ShardFiles, path: str, index: "TarIndex"):
        self.files, self.path, self.index = files, path, index
        self.blocks, self.tiles = len(index.starts) - 1, index.samples
        self.size, self.mpp = index.size, index.mpp

    def read(self, block: int) -> ShardRows:
        """The tiles of one run. Raises UserError when they are damaged."""
        start, stop = self.index.starts[block : block + 2]
        try:
            with self.files.open(self.path, "rb", **EXACTLY) as file:
                file.seek(start)
                content = file.read(stop - start)
        except OSError as error:
            raise unreadable_tar(self.path, error) from error
        streams, slides, corners = [], [], []
        try:
            for members in _samples(content):
                facts = json.loads(members[FACTS])
                slides.append(str(facts["slide"]))
                corners.append((int(facts["x"]), int(facts["y"])))
                streams.append(next((members[kind] for kind in IMAGES if kind in members), b""))
            wanted = min(GROUP_TILES, self.tiles - block * GROUP_TILES)
            if len(corners) != wanted:
                raise tarfile.ReadError(f"{len(corners)} samples where {wanted} were")
        except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
            raise unreadable_tar(self.path, error) from error
        return ShardRows(streams, slides, np.array(corners, np.int64).reshape(-1, 2))


@dataclass(frozen=True)
class TarIndex:
    """Where the samples of a tar lie.

    Attributes:
        bytes: of the tar.
        samples: how many it holds.
        starts: where each run of 64 samples begins, and where the last one ends.
        size, mpp: edge of its tiles in pixels and the resolution asked for, as the first of them says.
    """

    bytes: int
    samples: int
    starts: list[int]
    size: int
    mpp: float


def tar_index(files: ShardFiles, path: str) -> TarIndex:
    """The index of the tar at `path`, found beside it or made now. Raises UserError when the tar is damaged."""
    index = _saved_index(files, path)
    if index is None:
        try:
            with files.open(path, "rb") as file:
                index = _make_index(file, path)
        except OSError as error:
            raise unreadable_tar(path, error) from error
        if isinstance(files, LocalFiles):
            with suppress(UserError):  # the folder may be one that cannot be written to
                _save_index(index, path)
    return index


def _saved_index(files: ShardFiles, path: str) -> TarIndex | None:
    try:
        tar, own = files.info(path), files.info(f"{path}.index")
        with files.open(f"{path}.index", "rb") as file:
            checksum, _, content = file.read().decode().strip().partition(" ")
        index = TarIndex(**json.loads(content)) if checksum == _checksum(content) else None
    except (OSError, ValueError, TypeError):
        return None
    fits = index is not None and index.bytes == tar["size"] and tar.get("mtime", 0) <= own.get("mtime", 0)
    return index if fits else None


def _save_index(index: TarIndex, path: str) -> None:
    content = json.dumps(asdict(index))
    with atomic_path(f"{path}.index") as partial:
        partial.write_text(f"{_checksum(content)} {content}\n", encoding="utf-8")


def _checksum(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _make_index(file: BinaryIO, path: str) -> TarIndex:
    starts, samples, last, facts = [], 0, None, None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _files_of(tar):
                key, kind = _sample_name(member.name)
                if key != last:
                    starts += [member.offset] if samples % GROUP_TILES == 0 else []
                    samples, last = samples + 1, key
                if kind == FACTS and facts is None:
                    facts = json.loads(tar.extractfile(member).read(MAX_FACTS))
            end = tar.offset
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError("it does not end as a tar does")
        if samples and facts is None:
            raise tarfile.ReadError("no sample has a .json with slide, x, y, size and mpp_asked")
        size, mpp = (int(facts["size"]), float(facts["mpp_asked"])) if samples else (0, 0.0)
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise unreadable_tar(path, error) from error
    return TarIndex(file.seek(0, io.SEEK_END), samples, [*starts, end], size, mpp)


def _files_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # which it would keep to the end
        if member.isreg() and not member.issparse():
            yield member


def _samples(content: bytes) -> Iterator[dict[str, bytes]]:
    """The samples of a part of a tar: what their members hold, by their endings. Raises tarfile.TarError."""
    last, members = None, {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in _files_of(tar):
            key, kind = _sample_name(member.name)
            if members and key != last:
                yield members
                members = {}
            last, members[kind] = key, content[member.offset_data : member.offset_data + member.size]
    if members:
        yield members


def _sample_name(name: str) -> tuple[str, str]:
    """The name that the members of one sample share, up to the first dot behind the last slash, and the ending."""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return folder + slash + stem, kind.lower()


def unreadable_tar(path: str, error: Exception) -> UserError:
    """The error of a tar that is damaged."""
    return UserError(f"{path} cannot be read as a tar of tiles ({error}): it is damaged or incomplete; get it again")
