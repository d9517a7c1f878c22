"""Files that are either whole or absent: written beside their place, flushed to disk, then renamed into it."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import SlideError, UserError


WRITE_FAILURES = ("No space left", "inline_container")  # what safetensors and torch say when a disk is full
AFTER_MENDING = "mend that, and the same command goes on"


@contextmanager
def naming_write_errors(path: str | Path) -> Iterator[None]:
    """Turns a failure to write within the block into a UserError that names `path` and the cause, a full disk above all."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise SlideError(f"{path} cannot be written: its name is too long; rename the slide") from error
        raise UserError(f"{path} cannot be written: {error.strerror or error}; {AFTER_MENDING}") from error
    except (SafetensorError, RuntimeError) as error:
        if not any(words in str(error) for words in WRITE_FAILURES):
            raise
        raise UserError(f"{path} cannot be written: no space left on device; {AFTER_MENDING}") from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` when the block ends, removed when it raises."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory beside `path` to fill; it replaces `path` when the block ends, and goes when it raises."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            replace_directory(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace_directory(partial: Path, path: Path) -> None:
    """Puts the finished directory `partial` in the place of `path`, which is moved aside first and then removed."""
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.rename(path, aside)
    os.rename(partial, path)
    shutil.rmtree(aside, ignore_errors=True)


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
