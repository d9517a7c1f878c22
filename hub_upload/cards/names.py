"""What may be said in public of a place: its name, never where it lies, since folders name users, hospitals and patients."""

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAY_BE_HUB_IDS = ("encoder", "tile_encoder", "region_encoder", "tissue")  # options that take a Hub id or a directory


def is_hub_id(place: str | Path) -> bool:
    """Whether `place` is the id of a repository, and no directory of this machine."""
    return HUB_ID.fullmatch(str(place)) is not None and not Path(place).exists()


def public_name(place: str | Path) -> str:
    """A Hub id or an address on the Hub as it is; of a file or directory its last part alone."""
    text = str(place)
    return text if text.startswith("hf://") or is_hub_id(text) else last_part(text)


def last_part(place: str) -> str:
    """The name of a file or directory, whichever of the two separators its path has."""
    return PureWindowsPath(place).name or "a directory"


def without_paths(value: Any, name: str | None = None) -> Any:
    """The `value` of the option `name`, or a mapping or list of values, in which each path is reduced to a name."""
    if isinstance(value, Mapping):
        return {key: without_paths(each, key) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(each, name) for each in value]
    if not isinstance(value, str | Path) or not re.search(r"[/\\]", str(value)):
        return value
    if name in MAY_BE_HUB_IDS or str(value).startswith("hf://"):
        return public_name(value)
    return last_part(str(value))
