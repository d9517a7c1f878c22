"""The list of a dataset's finished shards, `shards.json`: what they were made of, what is in each, and its checksum."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import write_json
from ..errors import UserError
from ..slides.grid import TileGrid


MAX_UNREADABLE = 0.01  # share of a slide's tiles; a slide that loses more is damaged, and is named
NAME = "shards.json"


@dataclass(frozen=True)
class Shard:
    """A finished shard.

    Attributes:
        file: its path in the folder of the dataset.
        first, stop: which of the blocks, in their order, are in it.
        tiles: how many it holds, and `passed` how many of them are the scanner's own streams.
        unreadable: how many tiles of which slide were left out.
        bytes, sha256: of the file; the Hub knows files by the same hash.
    """

    file: str
    first: int
    stop: int
    tiles: int
    passed: int
    unreadable: dict[str, int]
    bytes: int
    sha256: str

    @classmethod
    def of_file(cls, folder: Path, file: str, **facts: Any) -> "Shard":
        """The shard that was just written to `file`."""
        return cls(file, **facts, bytes=(folder / file).stat().st_size, sha256=_checksum(folder / file))

    def is_whole(self, folder: Path) -> bool:
        """Whether the file is there, as it was written."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.bytes and _checksum(path) == self.sha256


@dataclass
class Manifest:
    """What a folder of shards is made of.

    Attributes:
        folder: of the dataset.
        asked: everything that decides the bytes of the shards.
        shards: those that are finished, in their order.
    """

    folder: Path
    asked: dict[str, Any]
    shards: list[Shard] = field(default_factory=list)

    @classmethod
    def begin(cls, folder: Path, asked: dict[str, Any]) -> "Manifest":
        """The manifest in `folder`, or a new one. Raises UserError when the folder holds shards of something else."""
        if not (folder / NAME).is_file():
            if any((folder / "data").glob("*")):
                raise UserError(
                    f"{folder / 'data'} holds files that no {NAME} lists: choose another --out, or empty it"
                )
            manifest = cls(folder, asked)
            manifest.save()
            return manifest
        manifest = cls.load(folder)
        other = [name for name in asked if manifest.asked.get(name) != asked[name]]
        if other:
            raise UserError(
                f"{folder} holds shards that were made with other {', '.join(other)}: choose another --out, or delete it"
            )
        return manifest

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """The manifest in `folder`. Raises UserError when it is missing or damaged."""
        path = Path(folder) / NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(Path(folder), dict(content["asked"]), [Shard(**shard) for shard in content["shards"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): delete {folder} and make the shards again") from error

    def save(self) -> None:
        """Writes `shards.json`."""
        write_json(self.folder / NAME, {"asked": self.asked, "shards": [asdict(shard) for shard in self.shards]})

    def found(self, first: int) -> Shard | None:
        """The finished shard that begins with block `first`, if its file is whole."""
        shard = next((shard for shard in self.shards if shard.first == first), None)
        return shard if shard is not None and shard.is_whole(self.folder) else None

    def before(self, first: int) -> list[Shard]:
        """The finished shards that lie before block `first`."""
        return [shard for shard in self.shards if shard.first < first]

    def record(self, shard: Shard) -> None:
        """Takes note of a finished shard, in the place of the one that began with the same block."""
        others = [other for other in self.shards if other.first != shard.first]
        self.shards = sorted([*others, shard], key=lambda each: each.first)
        self.save()

    @property
    def tiles(self) -> int:
        return sum(shard.tiles for shard in self.shards)

    @property
    def passed(self) -> int:
        """How many tiles are the scanner's own JPEG streams."""
        return sum(shard.passed for shard in self.shards)

    @property
    def unreadable(self) -> Counter[str]:
        """How many tiles of which slide could not be read."""
        return sum((Counter(shard.unreadable) for shard in self.shards), Counter())

    def damaged_slides(self, grids: Iterable[TileGrid]) -> list[str]:
        """One message for every slide of which more than 1 % of the tiles could not be read."""
        totals: Counter[str] = Counter()
        for grid in grids:
            totals[grid.slide] += len(grid)
        return [
            f"{slide}: {count} of {totals[slide]} tiles could not be read and were left out: get the slide again, or leave "
            "it out, and make the shards anew"
            for slide, count in sorted(self.unreadable.items())
            if count > MAX_UNREADABLE * totals[slide]
        ]


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
