"""Blocks of tiles out of shards, on disk or on the Hub: row groups of Parquet, runs of samples in a tar.

Only what is asked for is read, or fetched: one block costs one request to the Hub. A shard's order is random already (see
`write_shards.py`), and the stream mixes the blocks of all shards anew in every epoch.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from .blocks import TileRows
from .filters import TileFilter
from .jpeg_tiles import decode_tile
from .shard_files import EXACTLY, ShardFiles, find_shards
from .shard_formats import FORMATS, ShardRows
from .tar_shard import TarIndex, TarShard, tar_index


OPEN_SHARDS = 32  # files that one process keeps open
LOOKING = 16  # shards that are looked at together, because the Hub takes its time for each
MAX_TILE_EDGE = 4096  # pixels
MAX_GROUP_TILES = 1024  # that are decoded at once
COLUMNS = ("image", "slide", "x", "y", "size", "mpp_asked")


class ShardBlocks:
    """The blocks of all shards, numbered through in the order of the shards' names, and read when they are asked for.

    Args:
        shards: a folder, a file, several of these, or hf://datasets/ORG/NAME with or without a folder in it.
        files: the file system they are in; by default the Hub for hf://, else the disk.
        tile_filter: which tiles are good enough, judged by their pixels.

    Attributes:
        size: edge of the tiles in pixels.
        mpp: the resolutions that they were made for, of the first tile of each shard, sorted.
        tiles: how many there are.

    A `TileSource`, as `SlideBlocks` is. Raises UserError when there are no shards, when one of them is damaged or lacks a
    column, and when their tiles differ in size.
    """

    weights = None

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        files: ShardFiles | None = None,
        tile_filter: TileFilter | None = None,
    ):
        self.files, self.paths = find_shards(shards, files)
        self.tile_filter = tile_filter
        self._indices: dict[str, TarIndex] = {}
        with ThreadPoolExecutor(LOOKING) as pool:
            facts = pool.map(self._look_at, self.paths)
            blocks, tiles, sizes, mpps = (np.array(column) for column in zip(*facts))  # (shards,)
        self.tiles = int(tiles.sum())
        if not self.tiles:
            raise UserError(f"{shards} holds no tile: make the shards again")
        self.size, self.mpp = self._one_size(sizes, tiles), sorted(set(mpps[tiles > 0].tolist()))
        self._ends = np.cumsum(blocks)
        self._make_cache()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_shard"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._make_cache()

    def _make_cache(self) -> None:
        """What was used last stays open: each process has its own."""
        self._shard = lru_cache(OPEN_SHARDS)(lambda index: self._open(self.paths[index]))

    @property
    def fingerprint(self) -> str:
        """A hash of the shards' names, sizes and blocks: runs with the same one see the same tiles."""
        names = [path.rpartition("/")[2] for path in self.paths]
        sizes = [self.files.info(path)["size"] for path in self.paths]
        return hashlib.blake2b(repr((names, sizes, self._ends.tolist())).encode(), digest_size=8).hexdigest()

    def read(self, numbers: Sequence[int]) -> TileRows:
        """The tiles of these blocks; None for one whose image is damaged or has another size, or which the filter drops."""
        tiles, slides, corners = [], [], []
        for number in sorted(numbers):
            index = int(np.searchsorted(self._ends, number, side="right"))
            shard = self._shard(index)
            rows = shard.read(int(number - self._ends[index]) + shard.blocks)
            tiles += [self._decode(stream) for stream in rows.streams]
            slides += rows.slides
            corners.append(rows.xy)
        return TileRows(tiles, slides, np.concatenate(corners))

    def _decode(self, stream: bytes) -> np.ndarray | None:
        tile = decode_tile(stream, self.size)
        return tile if tile is not None and (self.tile_filter is None or self.tile_filter(tile)) else None

    def _look_at(self, path: str) -> tuple[int, int, int, float]:
        """How many blocks and tiles a shard has, and size and resolution of its tiles."""
        if not path.endswith(FORMATS["parquet"]):
            self._indices[path] = tar_index(self.files, path)
        shard = self._open(path)
        return shard.blocks, shard.tiles, shard.size, shard.mpp

    def _open(self, path: str) -> "ParquetShard | TarShard":
        if path in self._indices:
            return TarShard(self.files, path, self._indices[path])
        return ParquetShard(self.files, path)

    def _one_size(self, sizes: np.ndarray, tiles: np.ndarray) -> int:
        """The edge of the tiles of all shards that have any."""
        known = {int(size): path for size, path, any_tile in zip(sizes, self.paths, tiles > 0) if any_tile}
        for size, path in known.items():
            if not 0 < size <= MAX_TILE_EDGE:
                raise UserError(f"{path} claims tiles of {size} px: it is no shard of tiles, or damaged; get it again")
        if len(known) > 1:
            (size, path), (other, second) = list(known.items())[:2]
            raise UserError(f"{path} has tiles of {size} px and {second} of {other} px: stream them one by one")
        return next(iter(known))


class ParquetShard:
    """A Parquet file of tiles. Raises UserError when it is damaged, or lacks a column.

    Attributes:
        blocks: how many row groups it has.
        tiles: how many rows.
        size, mpp: edge of a tile in pixels and the resolution asked for, as its first tile says; 0 when there is none.
    """

    def __init__(self, files: ShardFiles, path: str):
        self.path = path
        try:
            self.file = pq.ParquetFile(files.open(path, "rb", **EXACTLY), pre_buffer=True)
            self._check_columns()
            self.blocks, self.tiles = self.file.num_row_groups, self.file.metadata.num_rows
            groups = [self.file.metadata.row_group(block).num_rows for block in range(self.blocks)]
            self.size, self.mpp = self._first_tile() if self.tiles else (0, 0.0)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error
        if max(groups, default=0) > MAX_GROUP_TILES:
            raise UserError(
                f"{path} has row groups of {max(groups):,} tiles, too many to be decoded at once: "
                "write it with row groups of about 64"
            )

    def read(self, block: int) -> ShardRows:
        """The tiles of one row group."""
        try:
            table = self.file.read_row_group(block, ["image.bytes", "slide", "x", "y"])
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error
        streams = [stream or b"" for stream in table["image"].combine_chunks().field("bytes").to_pylist()]
        xy = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1).astype(np.int64)
        return ShardRows(streams, table["slide"].to_pylist(), xy)

    def _first_tile(self) -> tuple[int, float]:
        first = next(self.file.iter_batches(1, columns=["size", "mpp_asked"])).to_pylist()[0]
        return first["size"] or 0, first["mpp_asked"] or 0.0

    def _check_columns(self) -> None:
        names = self.file.schema_arrow.names
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise UserError(
                f"{self.path} has no column {', '.join(missing)} (it has {', '.join(names)}): "
                "stream shards that hf-pathology shard wrote, or add the column"
            )
        image = self.file.schema_arrow.field("image").type
        if not (pa.types.is_struct(image) and image.get_field_index("bytes") >= 0):
            raise UserError(f"{self.path}: column image is {image}, and not {{bytes, path}} as the Hub stores images")

    def _unreadable(self, error: Exception) -> UserError:
        said = str(error).splitlines()[0]
        return UserError(f"{self.path} cannot be read as Parquet ({said}): it is damaged or incomplete; get it again")
