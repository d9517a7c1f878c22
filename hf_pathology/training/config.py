"""Options of a recipe: a YAML file of numbers gives the defaults, the command line wins, unknown keys are errors."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..atomic import atomic_path
from ..errors import UserError


def parse_config(*types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """One instance of each dataclass in `types`, filled from `--config FILE.yaml` and then from the other options.

    The YAML is flat: its keys are the names of the dataclasses' fields, which are the names of the options. Fields
    without a default must come from either place. Raises UserError for a missing file or an unknown key, and leaves as
    argparse does, with the name of the option, for a value of the wrong kind.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(list(types), allow_abbrev=False)
    parser.add_argument("--config", help="YAML file whose keys are the options below; the command line wins")
    config = _option(argv, "--config")
    if config is not None:
        given = read_yaml(config)
        names = {field.name for kind in types for field in dataclasses.fields(kind)}
        unknown = sorted(set(given) - names)
        if unknown:
            raise UserError(f"{config} has unknown keys {', '.join(unknown)}: known are {', '.join(sorted(names))}")
        for action in parser._actions:
            if action.dest in given:
                action.required = False
                given[action.dest] = _as_default(action, given[action.dest], config)
        parser.set_defaults(**given)
    *instances, _ = parser.parse_args_into_dataclasses(argv)
    return tuple(instances)


def deciding(*options: Any) -> dict[str, Any]:
    """What of all `options` decides a run's result: what each says by its `deciding()`, or all fields of a dataclass."""
    together: dict[str, Any] = {}
    for each in options:
        together |= each.deciding() if hasattr(each, "deciding") else dataclasses.asdict(each)
    return together


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`. Raises UserError when it is missing or holds no mapping."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of options to values")
    return content


def write_config(path: str | Path, *options: Any) -> None:
    """Writes the fields of all dataclasses `options` to a YAML file, by which `--config` gives the same again."""
    together = {name: value for each in options for name, value in dataclasses.asdict(each).items()}
    with atomic_path(path) as partial:
        partial.write_text(yaml.safe_dump(together, allow_unicode=True), encoding="utf-8")


def _as_default(action: argparse.Action, value: Any, config: str) -> Any:
    """The `value` of an option in a YAML file as a default that argparse checks: it converts text and nothing else."""
    if value is None:
        return None
    if action.nargs == "+" and not isinstance(value, list):
        raise UserError(f"{config}: {action.dest} is a list, write [{value}]")
    if action.choices is not None and value not in action.choices:
        raise UserError(f"{config}: {action.dest} is {value}, must be one of {', '.join(map(str, action.choices))}")
    return str(value) if type(value) in (int, float) else value  # so 1.5 for an integer is refused


def _option(argv: list[str], name: str) -> str | None:
    """The value of option `name` in `argv`, written `--name value` or `--name=value`."""
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(name + "="):
            return word.removeprefix(name + "=")
    return None
