"""Which files of a folder belong to a release, and as what they go to the Hub."""

import hashlib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from hf_pathology.errors import UserError


Kind = Literal["model", "dataset"]
BELONGS: dict[Kind, tuple[str, ...]] = {
    "model": (
        "README.md",
        "config.json",
        "*.safetensors",
        "*.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        "adapter_config.json",
        "fingerprint.json",
        "conversion.json",
        "training.json",
        "*.py",
        "LICENSE*",
        "LICENCE*",
        "NOTICE*",
        "CITATION.cff",
        "training/*",
    ),
    "dataset": ("README.md", "data/*.parquet", "data/*.tar", "shards.json", "LICENSE*", "LICENCE*", "NOTICE*", "CITATION.cff"),
}  # fmt: skip
LARGE = ("*.safetensors", "*.parquet", "*.tar", "*.bin", "*.npz", "*.png", "*.jpg", "*.zip")  # always LFS on the Hub
LARGE_BYTES = 10_000_000  # from this size on, every file is
FINGERPRINT = "fingerprint.json"
PLACEHOLDER = "PATH_OR_ID"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class ReleaseFile:
    """A file of a release.

    Attributes:
        path: in the repository.
        source: where it lies, or its content where that is not what lies there.
        size: in bytes.
        sha256: of the content.
    """

    path: str
    source: Path | bytes
    size: int = field(init=False)
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.source, bytes):
            size, digest = len(self.source), hashlib.sha256(self.source).hexdigest()
        else:
            size = self.source.stat().st_size
            with open(self.source, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "sha256", digest)

    @property
    def is_large(self) -> bool:
        """Whether the Hub keeps it as a large file (LFS), by its usual rules; the Hub itself has the last word."""
        return self.size >= LARGE_BYTES or any(fnmatchcase(self.path, pattern) for pattern in LARGE)


@dataclass(frozen=True)
class Contents:
    """What of a folder goes up, and what does not.

    Attributes:
        kind: what the repository is.
        files: that go up, by their path.
        left: paths of files that do not, with the reason.
    """

    kind: Kind
    files: list[ReleaseFile]
    left: dict[str, str]

    def __getitem__(self, path: str) -> ReleaseFile:
        return next(file for file in self.files if file.path == path)

    def __contains__(self, path: object) -> bool:
        return any(file.path == path for file in self.files)


def kind_of(folder: Path) -> Kind:
    """Whether a folder is a model's or a dataset's. Raises UserError when it is neither."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: pass a release, a folder of shards or a folder of features")
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return "model"
    if any((folder / "data").glob("*.parquet")) or any((folder / "data").glob("*.tar")):
        return "dataset"
    for part in ("encoder", "head", "merged"):
        if (folder / part / "config.json").is_file():
            raise UserError(f"{folder} is the folder of a run: pass {folder / part}")
    raise UserError(
        f"{folder} holds no config.json, no shards and no features: pass what a recipe, `shard`, `embed` or `train-mil` wrote"
    )


def holds_features(folder: Path) -> bool:
    """Whether `embed` wrote the folder: features lie in it, or under it beside the record of the run."""
    lies_in = any(folder.glob("*.features.safetensors"))
    return lies_in or ((folder / "report.json").is_file() and any(folder.rglob("*.features.safetensors")))


def contents_of(
    folder: Path, repo_id: str, include: list[str], more: dict[str, Path | bytes] | None = None
) -> Contents:
    """What of `folder` goes to the repository `repo_id`.

    Args:
        include: patterns of further paths.
        more: further files by their path in the repository, which come in the place of those in the folder.

    The card that goes up names the repository where the one in the folder says PATH_OR_ID; the folder stays as it is. Raises UserError
    for a pattern that fits nothing, and for weights that are a pickle.
    """
    kind = kind_of(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for pattern in include:
        if not any(fits(path, pattern) for path in paths):
            raise UserError(f"--include {pattern} fits no file of {folder}")
    files, left = [], {}
    more = more or {}
    for name, path in paths.items():
        if name in more:
            continue
        asked = any(fits(name, pattern) for pattern in include)
        if path.suffix.lower() in PICKLES and (asked or kind == "model"):
            if asked:
                raise UserError(f"{path} is a pickle, which can run code where it is loaded: save it as safetensors")
            left[name] = "a pickle, which can run code where it is loaded"
        elif asked or any(fits(name, pattern) for pattern in BELONGS[kind]):
            files.append(ReleaseFile(name, path))
        else:
            left[name] = "no part of a release"
    files += [ReleaseFile(name, source) for name, source in more.items()]
    if not files:
        raise UserError(f"{folder} holds nothing to release")
    files = [for_repository(file, repo_id) if file.path == "README.md" else file for file in files]
    return Contents(kind, sorted(files, key=lambda file: file.path), left)


def fits(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern, whose `*` does not pass over a slash."""
    parts = pattern.split("/")
    return len(parts) == path.count("/") + 1 and all(map(fnmatchcase, path.split("/"), parts))


def for_repository(card: ReleaseFile, repo_id: str) -> ReleaseFile:
    """The card with the name of the repository in its examples."""
    text = card.source if isinstance(card.source, bytes) else card.source.read_bytes()
    return ReleaseFile(card.path, text.decode("utf-8").replace(PLACEHOLDER, repo_id).encode())


def belongs(path: str, kind: Kind) -> bool:
    """Whether a file of that path is one that a release owns: it is taken away when a new release lacks it."""
    return any(fits(path, pattern) for pattern in BELONGS[kind])
