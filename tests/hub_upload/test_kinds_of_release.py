"""Releases that are not one folder of one model: with their training, adapters, shards of tiles, folders of features."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import disable_progress_bars, enable_progress_bars
from huggingface_hub import DatasetCard
from peft import LoraConfig, get_peft_model
from releases import CARD, release_encoder, small_vit
from safetensors.torch import load_file, save_file

from hf_pathology.commands.release import record_of_training
from hf_pathology.errors import UserError
from hf_pathology.features.store import SlideFeatures, features_path
from hf_pathology.hub_upload.cards.dataset_cards import features_card
from hf_pathology.hub_upload.export import write_fingerprint
from hf_pathology.hub_upload.feature_dataset import feature_dataset
from hf_pathology.hub_upload.release import check_adapter, check_dataset, check_model
from hf_pathology.hub_upload.release_files import contents_of, holds_features
from hf_pathology.training.integrity import sealed_index


@pytest.fixture(autouse=True)
def no_progress_bars():
    yield disable_progress_bars()
    enable_progress_bars()


def bag(slide: str, tiles: int, width: int = 7) -> SlideFeatures:
    rng = np.random.default_rng(tiles)
    features, xy = rng.normal(size=(tiles, width)).astype(np.float32), rng.integers(0, 2**20, (tiles, 2))
    return SlideFeatures(
        slide, "e", "r", "cls", 224, 0.5, (448.0, 448.0), (9000, 9000), features, xy, np.full(tiles, True)
    )


# A run.


def write_run(folder: Path) -> Path:
    """The encoder of a run with one whole checkpoint."""
    checkpoint = folder / "checkpoints" / "step_00000020"
    checkpoint.mkdir(parents=True)
    save_file({"student.a": torch.ones(3), "teacher.a": torch.ones(3)}, checkpoint / "model.safetensors")
    (checkpoint / "random_states_0.pkl").write_bytes(b"pickle")
    index = sealed_index(checkpoint, {"step": 20, "config": {"learning_rate": 0.1}})
    (checkpoint / "checkpoint.json").write_text(json.dumps(index))
    (folder / "log.jsonl").write_text('{"step": 20, "loss": 1.0}\n')
    (folder / "config.yaml").write_text("learning_rate: 0.1\nslides: /home/jane/slides\n")
    (folder / "run.json").write_text('{"method": "DINO"}')
    return release_encoder(folder / "encoder")


def test_a_release_with_its_training_has_all_weights_log_and_options_and_no_pickle(tmp_path):
    encoder = write_run(tmp_path / "run")
    before = (encoder / "README.md").read_text()
    with record_of_training(encoder, True) as more:
        contents = contents_of(encoder, "org/name", [], more)
        added = {file.path for file in contents.files if "/" in file.path}
        assert added == {
            f"training/{name}" for name in ("checkpoint.safetensors", "config.yaml", "log.jsonl", "run.json")
        }
        options = contents["training/config.yaml"].source.read_text()
        assert "learning_rate: 0.1" in options and "jane" not in options
        assert sorted(load_file(contents["training/checkpoint.safetensors"].source)) == ["student.a", "teacher.a"]
        card = contents["README.md"].source.decode()
        assert "after 20 steps" in card and "training/checkpoint.safetensors" in card and "PATH_OR_ID" not in card
    assert (encoder / "README.md").read_text() == before and not (encoder / "training").exists()


def test_a_damaged_checkpoint_is_not_released(tmp_path):
    encoder = write_run(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000020" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="step_00000020 is damaged"), record_of_training(encoder, True):
        pass
    alone = release_encoder(tmp_path / "alone" / "encoder")
    with pytest.raises(UserError, match="has no config.yaml"), record_of_training(alone, True):
        pass


# Models.


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks by the old name
def test_an_adapter_needs_a_base_on_the_hub_and_finite_weights(tmp_path):
    adapted = get_peft_model(small_vit(), LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path / "good")
    (tmp_path / "good" / "README.md").write_text(CARD)
    file = tmp_path / "good" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))  # peft would ask the Hub for it
    contents = contents_of(tmp_path / "good", "org/name", [])
    assert check_model(contents, False) == check_adapter(contents) and not check_adapter(contents).fails
    for base in ("run/lora/encoder", "", str(tmp_path)):
        file.write_text(json.dumps({**config, "base_model_name_or_path": base}))
        (finding,) = check_adapter(contents).findings
        assert finding.severity == "error" and "base model is not on the Hub" in finding.what
    weights = load_file(tmp_path / "good" / "adapter_model.safetensors")
    save_file(
        {name: weight * float("nan") for name, weight in weights.items()},
        tmp_path / "good" / "adapter_model.safetensors",
    )
    assert any("not finite" in finding.what for finding in check_adapter(contents).findings)


def test_a_model_without_a_fingerprint_is_told_how_to_get_one(tmp_path):
    folder = release_encoder(tmp_path / "release")
    known = (folder / "fingerprint.json").read_bytes()
    (folder / "fingerprint.json").unlink()
    (finding,) = check_model(contents_of(folder, "org/name", []), False).findings
    assert finding.severity == "error" and "--write-fingerprint" in finding.what
    write_fingerprint(folder)
    assert (folder / "fingerprint.json").read_bytes() == known


# Datasets.


@pytest.mark.parametrize("per", ["slide", "tile"])
def test_a_folder_of_features_becomes_a_dataset_with_a_card(tmp_path, per):
    assert not holds_features(tmp_path / "none")
    for each in (bag("a.svs", 9), bag("sub/b.svs", 5)):
        each.save(features_path(tmp_path / "features", each.slide))
    assert holds_features(tmp_path / "features")
    with feature_dataset(tmp_path / "features", per) as folder:
        contents = contents_of(folder, "org/name", [])
        assert [file.path for file in contents.files] == ["README.md", "data/train-00000-of-00001.parquet"]
        card = contents["README.md"].source.decode()
        assert "14 vectors of 7 numbers (float32)" in card and 'load_dataset("org/name", split="train")' in card
        assert ("| `feature` |" in card) == (per == "tile")
        checked = check_dataset(contents)
        assert not checked.fails and "train has" in checked.passed
    assert not folder.exists()


def test_the_card_that_embed_wrote_becomes_one_of_rows_with_its_licence(tmp_path):
    bag("a.svs", 9).save(features_path(tmp_path, "a.svs"))
    (tmp_path / "README.md").write_text(features_card(tmp_path, licence="cc-by-4.0"))
    with feature_dataset(tmp_path, "slide") as folder:
        card = DatasetCard((folder / "README.md").read_text())
    assert card.data.license == "cc-by-4.0" and "load_dataset(" in card.text


def test_a_card_of_ones_own_is_kept_and_features_of_two_kinds_are_refused(tmp_path):
    bag("a.svs", 9).save(features_path(tmp_path, "a.svs"))
    (tmp_path / "README.md").write_text("# My features\n")
    with feature_dataset(tmp_path, "slide") as folder:
        assert (folder / "README.md").read_text() == "# My features\n"
    bag("b.svs", 5, width=8).save(features_path(tmp_path, "b.svs"))
    with pytest.raises(UserError, match="b.svs has features of 8 numbers"), feature_dataset(tmp_path, "slide"):
        pass


def test_a_dataset_that_cannot_be_loaded_is_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiles.parquet").write_bytes(b"damaged")
    (finding,) = check_dataset(contents_of(tmp_path, "org/name", [])).findings
    assert finding.severity == "error" and "datasets cannot load it" in finding.what
