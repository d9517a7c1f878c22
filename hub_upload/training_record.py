"""How a release was trained, for those who want to go on from it: student, teacher and heads, the options, the log."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from hf_pathology.atomic import atomic_directory, atomic_path, write_json
from hf_pathology.errors import UserError
from hf_pathology.hub_upload.cards.card import TRAINING_RECORD, fill_in, sha256_of
from hf_pathology.hub_upload.cards.names import without_paths
from hf_pathology.training.config import read_yaml
from hf_pathology.training.init_from import WEIGHTS, checkpoint_at
from hf_pathology.training.integrity import INDEX
from hf_pathology.training.machine import RUN_FILE


FOLDER = "training"
CHECKPOINT = "checkpoint.safetensors"


def add_training_record(run_folder: str | Path, release_folder: str | Path) -> Path:
    """Puts the record of a pretraining run into the release that was made of it, and returns its folder, `training/`.

    The card of the release says what is there. Raises UserError as `write_training_record`, and when there is no release.
    """
    release = Path(release_folder)
    if not (release / "config.json").is_file():
        raise UserError(f"{release} holds no release: pass the folder `encoder` of a run, or one of `encoders`")
    with atomic_directory(release / FOLDER) as partial:
        write_training_record(Path(run_folder), partial)
    card = with_training_record(read_card(release), release / FOLDER)
    with atomic_path(release / "README.md") as partial:
        partial.write_text(card, encoding="utf-8")
    return release / FOLDER


def write_training_record(run: Path, folder: Path) -> None:
    """Writes the record of a pretraining run into the existing `folder`.

    It holds `checkpoint.safetensors`, all weights and buffers of the method after its last whole checkpoint; `config.yaml`,
    every option; `log.jsonl`; and `run.json`, where and with what it ran. Paths are reduced to names. The optimizer and the
    random generators stay behind: they are pickles, which nobody should open.

    Raises UserError when `run` is no folder of a run, the checkpoint is sharded, or a record is missing.
    """
    for name in ("config.yaml", "log.jsonl", RUN_FILE):
        if not (run / name).is_file():
            raise UserError(f"{run} has no {name}: pass the folder that a pretraining recipe got as --out")
    checkpoint = checkpoint_at(run, "the run")
    shutil.copyfile(checkpoint / WEIGHTS, folder / CHECKPOINT)
    shutil.copyfile(run / "log.jsonl", folder / "log.jsonl")
    options = yaml.safe_dump(without_paths(read_yaml(run / "config.yaml")), allow_unicode=True)
    (folder / "config.yaml").write_text(options, encoding="utf-8")
    told = {"step": read_json(checkpoint / INDEX)["step"], **without_paths(read_json(run / RUN_FILE))}
    write_json(folder / RUN_FILE, told)


def with_training_record(card: str, folder: Path) -> str:
    """The card, which also says what the record of the training in `folder` holds."""
    checkpoint, step = folder / CHECKPOINT, read_json(folder / RUN_FILE)["step"]
    lines = [
        f"- [`{FOLDER}/{CHECKPOINT}`]({FOLDER}/{CHECKPOINT}): student, teacher, heads and centres, as far as the method has them, "
        f"after {step} steps; SHA-256 `{sha256_of(checkpoint)}`",
        f"- [`{FOLDER}/config.yaml`]({FOLDER}/config.yaml): every option of the run, paths reduced to names",
        f"- [`{FOLDER}/log.jsonl`]({FOLDER}/log.jsonl): its log; "
        f"[`{FOLDER}/{RUN_FILE}`]({FOLDER}/{RUN_FILE}): where and with what it ran",
    ]
    return fill_in(card, TRAINING_RECORD, "\n".join(lines))


def read_card(release: Path) -> str:
    """The text of the release's card; none is an empty one."""
    file = release / "README.md"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
