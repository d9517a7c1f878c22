"""What the documents say can be done: their commands exist, and the configurations they name are whole."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from hf_pathology.cli import app
from hf_pathology.recipes import (
    finetune_lora,
    pretrain_dino,
    pretrain_dinov2,
    pretrain_hipt4k,
    pretrain_ibot,
    pretrain_mae,
    pretrain_slpd,
)
from hf_pathology.training.config import parse_config


ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]


def commands_of(document: Path) -> list[list[str]]:
    """The words of every command in the document's bash blocks, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_verb_and_option_in_a_document_exists(document):
    program = typer.main.get_command(app)
    for words in commands_of(document):
        if words[0] != "hf-pathology":
            continue
        verb = program.commands[words[1]]
        options = {name for parameter in verb.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, shlex.join(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_and_file_in_a_document_exists(document):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands_of(document):
        if words[0] == "make":
            assert words[1] in targets
        for word in words:
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file(), word
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / link).exists(), link


SLIDES_TO_RUN = ["--slides", "s", "--out", "o"]
REGIONS_TO_RUN = ["--features", "f", "--out", "o"]
RECIPES = {
    "dino": (pretrain_dino.OPTIONS, SLIDES_TO_RUN),
    "dinov2": (pretrain_dinov2.OPTIONS, SLIDES_TO_RUN),
    "ibot": (pretrain_ibot.OPTIONS, SLIDES_TO_RUN),
    "mae": (pretrain_mae.OPTIONS, SLIDES_TO_RUN),
    "hipt4k": (pretrain_hipt4k.OPTIONS, REGIONS_TO_RUN),
    "slpd": (pretrain_slpd.OPTIONS, REGIONS_TO_RUN),
    "lora": ((finetune_lora.LoraOptions,), ["--encoder", "e", "--tiles", "t", "--out", "o"]),
}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_known_to_its_recipe_and_says_what_it_makes(path):
    options, required = RECIPES[path.stem.split("_")[0]]
    parse_config(*options, argv=["--config", str(path), *required])
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_launch_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert load_config_from_file(str(path)).num_processes == content["num_processes"]
