"""The log of a run: one JSON object a line, appended as the run goes, cut back when it resumes."""

import json
from pathlib import Path
from typing import Any

from ..atomic import atomic_path


class JsonLog:
    """Appends records to a JSON-lines file; each record carries the `step` it describes.

    Args:
        path: the file, made when absent.
        first_step: records of this step and later ones are dropped: they will be made again.
    """

    def __init__(self, path: Path, first_step: int):
        kept = [record for record in read_log(path) if record["step"] < first_step]
        with atomic_path(path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of the log at `path`, none when there is no file; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
