"""Cards of releases that the commands and recipes made: what they say was recorded, and what was not is said to be missing."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData
from jinja2 import UndefinedError
from PIL import Image
from safetensors.torch import load_file
from tiny_releases import LICENCE, RELEASES, make_all
from transformers import ViTConfig, ViTModel

from hf_pathology.errors import UserError
from hf_pathology.features.store import features_path
from hf_pathology.features.tables import saved_bags, to_dataset
from hf_pathology.hub_upload.cards.card import CardOptions, Facts, fill_in, render_card, sha256_of, write_card
from hf_pathology.hub_upload.cards.cost import EnergyOptions, cost_of_run, energy_and_carbon
from hf_pathology.hub_upload.cards.dataset_cards import features_card
from hf_pathology.hub_upload.cards.encoder_cards import converted_card
from hf_pathology.hub_upload.cards.evaluations import Evaluation
from hf_pathology.hub_upload.cards.head_cards import head_card
from hf_pathology.hub_upload.cards.names import public_name, without_paths
from hf_pathology.hub_upload.training_record import add_training_record
from hf_pathology.modeling.configuration_abmil import AbmilConfig
from hf_pathology.modeling.modeling_abmil import AbmilForSlideClassification
from hf_pathology.recipes import pretrain_ibot
from hf_pathology.training.config import parse_config
from hf_pathology.training.log import read_log


# peft asks transformers for a property that has been renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SECTIONS = ["How to use it", "Data", "Intended use and limits", "Licence", "Provenance"]
OF_MODELS = ["Training", "Cost", "Evaluation"]
DATASETS = ("features", "tiles")
SOURCE = {
    "files": [{"file": "/home/jane/vits8.pth", "bytes": 1234, "sha256": "ab" * 32}],
    "network": "teacher",
    "holds": "a ViT",
    "used": 150,
    "left_out": {"head": 7},
    "unexpected": ["extra.weight"],
    "missing": [],
    "architecture": {"depth": 2},
}
CONVERSION = {"format": "dino", "statistics": "imagenet", "mean": [0.5] * 3, "std": [0.25] * 3, "sources": [SOURCE]}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_all(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def cards(made) -> dict[str, str]:
    """The card of every kind."""
    found = {kind: (made / folder / "README.md").read_text(encoding="utf-8") for kind, folder in RELEASES.items()}
    return {**found, "converted": converted()}


def converted(**changes) -> str:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTModel(ViTConfig(**shape, image_size=32, patch_size=8))
    use = {"width": 32, "pooling": "cls", "mpp": None, "tile_size": 32}
    return converted_card(format="dino", model=model, conversion={**CONVERSION, **changes}, **use)


def read(kind: str, card: str) -> ModelCard | DatasetCard:
    return (DatasetCard if kind in DATASETS else ModelCard)(card)


def test_every_kind_has_all_sections_and_metadata_that_round_trips(cards):
    for kind, card in cards.items():
        headings = re.findall(r"^## (.*)$", card, re.MULTILINE)
        wanted = SECTIONS + ([] if kind in DATASETS else ["Conversion"] if kind == "converted" else OF_MODELS)
        assert set(wanted) <= set(headings) and len(set(headings)) == len(headings), kind
        loaded = read(kind, card)
        again = type(loaded)(str(loaded))
        assert again.data.to_dict() == loaded.data.to_dict() and again.text == loaded.text, kind
        assert {"pathology", "whole-slide-image"} <= set(loaded.data.tags), kind
        assert "{{" not in card and "None M" not in card and "\n\n\n" not in card and card.endswith(".\n"), kind


def test_no_card_says_where_anything_lies(cards, made):
    for kind, card in cards.items():
        assert str(made) not in card and made.parent.name not in card, kind
        assert not re.search(r"(?<![\w.\]`/:])/(home|tmp|root|mnt|data|Users|work|var)\b", card), kind
        assert "jane" not in card, kind


def test_the_licence_is_the_stated_one_or_said_to_be_missing(cards):
    for kind, card in cards.items():
        licence = LICENCE[1] if kind != "converted" else None
        assert read(kind, card).data.to_dict().get("license") == licence, kind
        assert ("as stated by those who" in card) == (licence is not None), kind
    assert "which is not stated in it" in cards["converted"]
    assert "The licence of `encoder`, from which it was made, applies too." in cards["adapter"]


def test_the_weights_can_be_told_by_their_hash(cards, made):
    for kind, folder in RELEASES.items():
        files = sorted((made / folder).glob("*.safetensors"))
        if kind in DATASETS:
            continue
        assert len(files) == 1, kind
        for file in files:
            assert f"SHA-256 of `{file.name}`: `{sha256_of(file)}`" in cards[kind], kind
    assert sha256_of(made / "shards" / "shards.json") in cards["tiles"]
    assert f"SHA-256 of the original `vits8.pth` (1,234 bytes): `{'ab' * 32}`" in cards["converted"]


def test_the_judge_of_a_pretraining_is_told_with_its_interval(cards, made):
    last = [record for record in read_log(made / "run" / "log.jsonl") if "knn_accuracy" in record][-1]
    assert last["step"] == 3 and last["knn_accuracy_low"] <= last["knn_accuracy"] <= last["knn_accuracy_high"]
    low, high = last["knn_accuracy_low"], last["knn_accuracy_high"]
    row = f"| accuracy of nearest neighbours | {last['knn_accuracy']:.3f} | {low:.3f} to {high:.3f} | labelled | vote of the 2"
    assert row in cards["encoder"] and "resampling whole groups" in cards["encoder"]
    (first, second) = ModelCard(cards["encoder"]).data.eval_results
    assert (first.metric_type, first.metric_value) == ("accuracy", last["knn_accuracy"])
    assert first.metric_args == {"low": low, "high": high, "confidence": 0.95}
    assert second.metric_type == "balanced_accuracy" and second.metric_args is None
    assert "| balanced accuracy of nearest neighbours |" in cards["encoder"]


def test_heads_tell_their_cross_validation_with_intervals(cards, made):
    metrics = json.loads((made / "abmil" / "metrics.json").read_text())
    auc = next(each for each in ModelCard(cards["abmil"]).data.eval_results if each.metric_type == "roc_auc")
    assert auc.metric_value == metrics["auc"]["value"] and auc.metric_args["low"] == metrics["auc"]["low"]
    assert f"{metrics['auc']['low']:.3f} to {metrics['auc']['high']:.3f}" in cards["abmil"]
    assert "8 slides of 8 cases, each out of its fold" in cards["abmil"] and "2-fold" in cards["abmil"]
    assert "4 `glandular`, 4 `solid`" in cards["abmil"]
    assert "made from `encoder`, revision `" in cards["hipt head"] and "HIPT's transformers" in cards["hipt head"]


def test_adapters_are_compared_and_only_their_own_numbers_are_in_the_metadata(cards, made):
    metrics = json.loads((made / "lora" / "metrics.json").read_text())
    found = ModelCard(cards["adapter"]).data.eval_results
    assert {each.metric_name for each in found} == {"accuracy, with the adapter", "ROC-AUC, with the adapter"}
    assert found[0].metric_args["low"] == metrics["accuracy_intervals"]["lora"]["low"]
    assert "| accuracy, colour alone |" in cards["adapter"] and "| accuracy, linear probe" in cards["adapter"]


def test_the_cost_is_that_of_the_log_on_the_machine_that_was_noted(cards, made):
    log = read_log(made / "run" / "log.jsonl")
    started = json.loads((made / "run" / "run.json").read_text())["starts"]
    assert [start["first_step"] for start in started] == [0] and started[0]["device"] == "CPU"
    assert started[0]["versions"]["transformers"]
    hours = sum(record["seconds"] for record in log) / 3600
    assert cost_of_run(made / "run", 4).device_hours["CPU"] == pytest.approx(hours)
    assert "energy: 0.5 kWh, as stated" in cards["encoder"] and "carbon: 0.028 kg" in cards["encoder"]
    for kind in ("abmil", "adapter", "hierarchy"):
        assert "on CPU, all processes together" in cards[kind] and "carbon: not measured" in cards[kind], kind


def test_a_run_that_went_on_elsewhere_is_counted_on_each_machine(tmp_path):
    seconds = [{"step": step, "seconds": 3600.0, "cpu_seconds": 3600.0 * (step + 1)} for step in range(4)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in seconds))
    first = {"first_step": 0, "device": "A100", "processes": 8, "mixed_precision": "bf16", "versions": {}}
    starts = [first, {**first, "first_step": 3, "device": "H200", "processes": 4}]
    (tmp_path / "run.json").write_text(json.dumps({"config": {}, "starts": starts}))
    cost = cost_of_run(tmp_path, 4)
    assert cost.device_hours == {"A100": 24.0, "H200": 4.0} and cost.processes == (8, 4) and cost.cpu_hours == 4.0
    assert cost_of_run(tmp_path, 2).device_hours == {"A100": 16.0}


def test_carbon_is_estimated_from_measured_energy_or_not_at_all(tmp_path):
    assert energy_and_carbon(tmp_path, EnergyOptions(carbon_intensity=100)) == {}
    rows = "run_id,energy_consumed,emissions,longitude\na,1.0,0.1,7.5\na,2.0,0.2,7.5\nb,0.5,0.05,7.5\n"
    (tmp_path / "emissions.csv").write_text(rows)
    found = energy_and_carbon(tmp_path, EnergyOptions())
    assert found["energy"] == 2.5 and found["carbon"] == 0.25 and found["energy_by"] == "measured by codecarbon"
    assert energy_and_carbon(tmp_path, EnergyOptions(carbon_intensity=100))["carbon"] == 0.25
    assert energy_and_carbon(tmp_path, EnergyOptions(energy_kwh=10, carbon_intensity=50))["carbon"] == 0.5
    (tmp_path / "emissions.csv").write_text("something,else\n1,2\n")
    with pytest.raises(UserError, match="emissions.csv is no emissions.csv of codecarbon"):
        energy_and_carbon(tmp_path, EnergyOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"licence": "Apache 2"}, "licence is 'Apache 2': give the Hub's identifier"),
        ({"energy_kwh": -1}, "energy_kwh is -1"),
        ({"carbon_intensity": -1}, "carbon_intensity is -1"),
    ],
)
def test_what_cannot_be_said_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        CardOptions(**options)


def test_an_encoder_on_the_way_does_not_pass_for_the_last(made):
    card = (made / "run" / "encoders" / "step_00000002" / "README.md").read_text()
    assert "2 of 4 steps: an encoder on the way" in card and "energy: not measured" in card
    assert "4 steps" not in card.replace("of 4 steps", "")


def test_missing_records_are_named(made):
    card = head_card(AbmilForSlideClassification(AbmilConfig(input_dim=4, num_labels=2)))
    for missing in ("slides: not recorded; cases: not recorded", "features: `not recorded`", "an unknown resolution"):
        assert missing in card
    for missing in ("how it was made: not recorded", "options: not recorded", "device hours: not recorded"):
        assert missing in card
    assert "Not recorded with this release." in card and "Not stated by those who made it." in card
    assert "SHA-256 of the weights: not recorded" in card
    assert "an unknown resolution" in converted()


def test_a_converted_checkpoint_says_what_was_taken_and_what_was_left(cards):
    for fact in (
        "`vits8.pth`",
        "taken: `teacher`, a ViT: 150 tensors",
        "left out: 7 of `head`",
        "`extra.weight`",
        "not in the file: none",
    ):
        assert fact in cards["converted"], fact
    both = converted(sources=[SOURCE, {**SOURCE, "files": [{"file": "vit4k.pth", "bytes": 5, "sha256": "cd" * 32}]}])
    assert (
        "# vits8.pth and vit4k.pth (dino), converted for transformers" in both and both.count("taken: `teacher`") == 2
    )


def test_a_new_kind_of_card_is_a_template_that_fills_one_block(tmp_path):
    (tmp_path / "segmenter.md.j2").write_text(
        '{% extends "card.md.j2" %}\n{% block summary %}\nIt finds {{ what }}.\n{% endblock %}\n'
    )
    data = ModelCardData(tags=["pathology"])
    number = Evaluation("Dice", "dice", 0.8, "12 slides", "held out", low=0.7, high=0.9)
    card = render_card(
        "segmenter", data, Facts("A segmenter", evaluations=[number]), templates=[tmp_path], what="nuclei"
    )
    assert "# A segmenter\n\nIt finds nuclei.\n\n## How to use it\n\nNot recorded.\n\n## Data\n\nNot recorded." in card
    assert "| Dice | 0.800 | 0.700 to 0.900 | 12 slides | held out |" in card
    with pytest.raises(UndefinedError, match="'what' is undefined"):
        render_card("segmenter", data, Facts("A segmenter"), templates=[tmp_path])
    assert "# A data set" in render_card("dataset", DatasetCardData(pretty_name="x"), Facts("A data set"))


def test_words_of_the_user_break_no_table():
    number = Evaluation("Dice | x", "dice", 0.8, "a\nb", "c")
    card = render_card("card", ModelCardData(), Facts("T", evaluations=[number], options={"a": "{{ 1 }}"}))
    assert r"| Dice \| x | 0.800 | not recorded | a b | c |" in card and "- `a`: {{ 1 }}" in card


def test_marks_are_filled_again_and_foreign_cards_stay_as_they_are(tmp_path):
    card = render_card("card", ModelCardData(), Facts("T"))
    (tmp_path / "model.safetensors").write_bytes(b"one")
    write_card(tmp_path, card)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    write_card(tmp_path, (tmp_path / "README.md").read_text())
    written = (tmp_path / "README.md").read_text()
    assert (
        written.count("SHA-256 of `model.safetensors`") == 1 and sha256_of(tmp_path / "model.safetensors") in written
    )
    write_card(tmp_path, "# A card")
    assert (tmp_path / "README.md").read_text() == "# A card"
    assert fill_in("# A card", "training record", "- x").count("- x") == 1


@pytest.mark.parametrize("kind", ["abmil", "hipt head", "encoder", "hierarchy", "merged", "classifier"])
def test_no_file_of_a_release_says_where_anything_lies(made, kind):
    for file in (made / RELEASES[kind]).glob("*.json"):
        assert str(made) not in file.read_text(), file.name


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("owkin/phikon", "owkin/phikon"),
        ("/home/jane/runs/encoder", "encoder"),
        ("C:\\Users\\jane\\encoder", "encoder"),
        ("runs/a/encoder/", "encoder"),
        ("hf://datasets/org/tiles", "hf://datasets/org/tiles"),
        ("/", "a directory"),
    ],
)
def test_a_place_is_known_by_its_name(place, name):
    assert public_name(place) == name


def test_paths_are_reduced_wherever_they_stand_in_options():
    options = {"slides": "data/jane", "encoder": "org/name", "masks": None, "classes": ["a", "b/c"], "n": 1}
    reduced = {"slides": "jane", "encoder": "org/name", "masks": None, "classes": ["a", "c"], "n": 1}
    assert without_paths(options) == reduced


def test_a_folder_that_exists_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("jane/encoder").mkdir(parents=True)
    assert public_name("jane/encoder") == "encoder"


def test_a_training_record_holds_the_method_the_options_and_the_log_and_the_card_says_so(made, tmp_path):
    release = made / "run" / "encoder"
    record = add_training_record(made / "run", release)
    add_training_record(made / "run", release)
    names = ["checkpoint.safetensors", "config.yaml", "log.jsonl", "run.json"]
    assert sorted(file.name for file in record.iterdir()) == names
    weights, exported = load_file(record / "checkpoint.safetensors"), load_file(release / "model.safetensors")
    kinds = {name.split(".")[0] for name in weights}
    assert {"student", "teacher", "student_head", "teacher_head"} <= kinds
    assert torch.equal(weights["teacher.layernorm.weight"], exported["layernorm.weight"])
    options = yaml.safe_load((record / "config.yaml").read_text())
    assert options["slides"] == "slides" and options["judge"] == "labelled" and options["steps"] == 4
    for name in names[1:]:
        assert str(made) not in (record / name).read_text(), name
    card = (release / "README.md").read_text()
    assert card.count(sha256_of(record / "checkpoint.safetensors")) == 1 and "after 4 steps" in card
    assert card.index("## Training") < card.index("training/checkpoint.safetensors") < card.index("## Cost")
    for run, where, message in [
        (tmp_path, release, "has no config.yaml"),
        (made / "run", tmp_path, "holds no release"),
    ]:
        with pytest.raises(UserError, match=message):
            add_training_record(run, where)


def test_the_written_options_give_the_same_run_again(made):
    first = parse_config(*pretrain_ibot.OPTIONS, argv=["--config", str(made / "run" / "config.yaml")])
    written = yaml.safe_load((made / "run" / "config.yaml").read_text())
    for options in first:
        for name, value in vars(options).items():
            assert written[name] == value, name


def test_features_of_two_encoders_get_no_card(made, tmp_path):
    first = next(saved_bags(made / "features"))
    for number in range(2):
        replace(first, slide=f"{number}.svs", revision=f"r{number}").save(features_path(tmp_path, f"{number}.svs"))
    with pytest.raises(UserError, match="mixes features of 2 encoders"):
        features_card(tmp_path)


RUN_SNIPPETS = """
import json, os, sys, traceback
for kind, (folder, blocks) in json.load(sys.stdin).items():
    os.chdir(folder)
    for block in blocks:
        try:
            exec(compile(block, kind, "exec"), {})
        except BaseException:  # a snippet that exits by itself has failed, too
            sys.exit(f"{kind}:\\n{block}\\n{traceback.format_exc()}")
print("all ran")
"""


@pytest.mark.slow
def test_the_code_of_every_card_runs_in_a_fresh_process(cards, made, tmp_path):
    """In a folder that holds what the code names: a tile, a region, the features of a slide."""
    features = next((made / "features").rglob("*.features.safetensors"))
    (tmp_path / "slide.svs.features.safetensors").write_bytes(features.read_bytes())
    Image.new("RGB", (32, 32), "pink").save(tmp_path / "tile.png")
    Image.new("RGB", (128, 128), "pink").save(tmp_path / "region.png")
    snippets = {}
    for kind, folder in RELEASES.items():
        snippets[kind] = (str(tmp_path), code_of(cards[kind], made / folder))
    for per in ("slide", "tile"):
        folder = tmp_path / per
        (folder / "data").mkdir(parents=True)
        to_dataset(saved_bags(made / "features"), per).to_parquet(folder / "data" / "train-0.parquet")
        card = features_card(made / "features", per)
        (folder / "README.md").write_text(card)
        snippets[per] = (str(tmp_path), code_of(card, folder))
    assert all(blocks for _, blocks in snippets.values())
    finished = subprocess.run(
        [sys.executable, "-c", RUN_SNIPPETS], input=json.dumps(snippets), capture_output=True, text=True, check=False
    )
    assert finished.stdout.endswith("all ran\n"), finished.stderr


def code_of(card: str, folder: Path) -> list[str]:
    return [block.replace("PATH_OR_ID", str(folder)) for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL)]
