"""The log of a run: one JSON object a line, appended as the run goes, cut back when it resumes."""

import json
import math
from pathlib import Path
from typing import Any

from ..atomic import atomic_path, naming_write_errors


class JsonLog:
    """Appends records of numbers and words to a JSON-lines file; each carries the `step` it describes.

    A number that is not finite is `null`.

    Args:
        path: the file, made when absent.
        first_step: records of this step and later ones are dropped: they will be made again.
    """

    def __init__(self, path: Path, first_step: int):
        kept = [record for record in read_log(path) if record["step"] < first_step]
        with atomic_path(path) as partial:
            partial.write_text("".join(map(as_line, kept)), encoding="utf-8")
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        with naming_write_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(as_line(record))


def as_line(record: dict[str, Any]) -> str:
    """The record as one line of JSON, which knows no number that is not finite."""
    known = {name: value if isinstance(value, str) or is_number(value) else None for name, value in record.items()}
    return json.dumps(known) + "\n"


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return not isinstance(value, str) and math.isfinite(value)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of the log at `path`, none when there is no file; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        records.append({name: math.nan if value is None else value for name, value in record.items()})
    return records
