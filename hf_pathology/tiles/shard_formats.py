"""What a shard holds, and how it is written: Parquet that `datasets` opens with pictures, or a tar for WebDataset.

A row is a dict of `FEATURES`. Both formats hold the same facts, and the same rows always give the same bytes.
"""

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value


FORMATS = {"parquet": ".parquet", "webdataset": ".tar"}  # with the suffix of their files
GROUP_TILES = 64  # that are read together, about: a row group of Parquet, a run of samples in a tar
FEATURES = Features(
    {
        "image": Image(),
        "slide": Value("string"),
        "case": Value("string"),
        "label": Value("string"),
        "x": Value("int64"),
        "y": Value("int64"),
        "mpp": Value("float64"),
        "mpp_asked": Value("float64"),
        "size": Value("int32"),
        "tissue_fraction": Value("float32"),
    }
)
TEXTS = ["slide", "case", "label"]
NUMBERS = [name for name in FEATURES if name not in ("image", *TEXTS)]


@dataclass(frozen=True)
class ShardRows:
    """Tiles as a shard holds them; lists of the same length.

    Attributes:
        streams: of JPEG; b"" where there is none.
        slides: keys of the slides.
        xy: int64 (N, 2), corners in level-0 pixels.
    """

    streams: list[bytes]
    slides: list[str]
    xy: np.ndarray


def write_rows(path: Path, name: str, groups: Iterable[list[dict[str, Any]]]) -> None:
    """Writes a shard to `path`, row group after row group, in the format that the suffix of `name`, its later name, says."""
    write = _write_parquet if name.endswith(FORMATS["parquet"]) else _write_tar
    write(path, name.partition(".")[0], groups)


def _write_parquet(path: Path, stem: str, groups: Iterable[list[dict[str, Any]]]) -> None:
    """Columns are not compressed: JPEG cannot be, and the texts are stored once in each row group."""
    schema = FEATURES.arrow_schema  # its metadata tells `datasets` that `image` is a picture
    options = {"compression": "none", "use_dictionary": TEXTS, "write_statistics": [*TEXTS, *NUMBERS]}
    with pq.ParquetWriter(path, schema, **options) as writer:
        for rows in groups:
            table = pa.Table.from_pylist([{**row, "image": {"bytes": row["image"]}} for row in rows], schema)
            writer.write_table(table, row_group_size=len(rows))


def _write_tar(path: Path, stem: str, groups: Iterable[list[dict[str, Any]]]) -> None:
    """Samples are named after shard and number: names of slides, which may be anything, stand only in the JSON."""
    number = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for rows in groups:
            for row in rows:
                facts = {name: value for name, value in row.items() if name != "image"}
                _add(tar, f"{stem}-{number:06d}.jpg", row["image"])
                _add(tar, f"{stem}-{number:06d}.json", json.dumps(facts, allow_nan=False).encode())
                number += 1


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no owner and no time
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
