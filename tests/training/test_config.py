"""Options from a YAML file and the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from hf_pathology.errors import UserError
from hf_pathology.training.config import parse_config, read_yaml


@dataclass
class Data:
    slides: str
    mpp: float
    splits: list[str] = field(default_factory=lambda: ["train"])
    table: str | None = "cohort.csv"
    stains: list[str] | None = None


@dataclass
class Rates:
    steps: int
    learning_rate: float = 5e-4
    norm: Literal["ln", "bn"] = "ln"
    cpu: bool = False


@pytest.fixture
def yaml_file(tmp_path):
    """Writes a YAML file and gives its path."""

    def write(text: str) -> str:
        path: Path = tmp_path / "options.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


REQUIRED = "slides: somewhere\nmpp: 0.5\nsteps: 100\n"


def test_the_yaml_gives_the_defaults_of_all_dataclasses(yaml_file):
    config = yaml_file(
        REQUIRED + "learning_rate: 0.002\ncpu: true\nsplits: [train, val]\ntable: null\nstains: null\nnorm: bn\n"
    )
    data, rates = parse_config(Data, Rates, argv=["--config", config])
    assert data == Data(slides="somewhere", mpp=0.5, splits=["train", "val"], table=None)
    assert rates == Rates(steps=100, learning_rate=0.002, norm="bn", cpu=True)


def test_what_the_yaml_leaves_out_keeps_its_default(yaml_file):
    data, rates = parse_config(Data, Rates, argv=["--config", yaml_file(REQUIRED)])
    assert data == Data(slides="somewhere", mpp=0.5)
    assert rates == Rates(steps=100)


def test_the_command_line_wins_over_the_yaml(yaml_file):
    config = yaml_file(REQUIRED + "learning_rate: 0.002\ncpu: true\n")
    argv = ["--steps", "7", f"--config={config}", "--learning-rate", "0.3", "--cpu", "false", "--splits", "a", "b"]
    data, rates = parse_config(Data, Rates, argv=argv)
    assert rates == Rates(steps=7, learning_rate=0.3, cpu=False)
    assert data.splits == ["a", "b"]


def test_without_a_yaml_the_command_line_alone_serves():
    (rates,) = parse_config(Rates, argv=["--steps", "3"])
    assert rates == Rates(steps=3)


def test_an_unknown_key_is_an_error_that_names_it_and_the_known_ones(yaml_file):
    config = yaml_file(REQUIRED + "lerning_rate: 0.1\n")
    with pytest.raises(UserError, match=r"unknown keys lerning_rate: known are .*learning_rate"):
        parse_config(Data, Rates, argv=["--config", config])


def test_an_unknown_option_is_an_error(yaml_file):
    with pytest.raises((ValueError, SystemExit), match="lerning_rate"):
        parse_config(Rates, argv=["--steps", "1", "--lerning_rate", "0.1"])


def test_an_abbreviated_option_is_an_error():
    with pytest.raises((ValueError, SystemExit), match="--learn"):
        parse_config(Rates, argv=["--steps", "1", "--learn", "0.1"])


def test_a_missing_yaml_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match="absent.yaml"):
        parse_config(Rates, argv=["--config", str(tmp_path / "absent.yaml")])


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "just words\n", "a: [1\n"])
def test_a_yaml_without_a_mapping_is_an_error_that_names_the_file(yaml_file, text):
    with pytest.raises(UserError, match="options.yaml"):
        read_yaml(yaml_file(text))


def test_a_required_option_in_neither_place_ends_the_program_naming_it(yaml_file, capsys):
    with pytest.raises(SystemExit):
        parse_config(Data, Rates, argv=["--config", yaml_file("slides: somewhere\nsteps: 1\n")])
    assert "--mpp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("5E3", 5e3), ("1", 1.0), ("-1e-4", -1e-4)]
)
def test_every_way_to_write_a_number_is_a_number(yaml_file, text, value):
    (rates,) = parse_config(Rates, argv=["--config", yaml_file(f"steps: 1\nlearning_rate: {text}\n")])
    assert rates.learning_rate == value
    assert isinstance(rates.learning_rate, float)


@pytest.mark.parametrize("line", ["steps: 1.5", "steps: many", "steps: 1\nlearning_rate: fast"])
def test_a_yaml_value_of_the_wrong_kind_ends_the_program_naming_the_option(yaml_file, capsys, line):
    with pytest.raises(SystemExit):
        parse_config(Rates, argv=["--config", yaml_file(line)])
    assert line.splitlines()[-1].split(":")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("line", ["norm: group", "splits: train"])
def test_a_yaml_value_outside_its_choices_or_no_list_is_an_error_that_names_it(yaml_file, line):
    with pytest.raises(UserError, match=line.split(":")[0]):
        parse_config(Data, Rates, argv=["--config", yaml_file(REQUIRED + line)])
