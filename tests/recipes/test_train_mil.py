"""Slide classification end to end: witnesses are found, chance stays chance, and a head refuses what it does not know."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_pathology.errors import UserError
from hf_pathology.evaluation.intervals import auc_difference
from hf_pathology.features.bags import read_labelled_bags
from hf_pathology.features.store import SlideFeatures, features_path
from hf_pathology.recipes import predict_slides
from hf_pathology.recipes.predict_slides import class_probabilities, load_head, predict
from hf_pathology.recipes.train_mil import HeadTraining, cross_validate, train_head, train_mil


QUICK = HeadTraining(epochs=20, max_tiles=40)


def cohort(n: int = 40, seed: int = 0) -> tuple[list[SlideFeatures], list[str], list[str]]:
    """Bags, labels and cases of `n` slides, two of each case: 3 of about 40 tiles of a "tumour" slide are witnesses.

    One tile of each slide could not be read.
    """
    generator = np.random.default_rng(seed)
    bags, labels = [], []
    for i in range(n):
        labels.append("tumour" if i // 2 % 2 else "normal")
        features = generator.normal(size=(generator.integers(30, 60), 16)).astype(np.float32)
        if labels[-1] == "tumour":
            features[1:4, 0] += 6.0
        valid = np.arange(len(features)) > 0
        features[~valid] = np.nan
        bags.append(
            SlideFeatures(
                slide=f"site/slide{i:02d}.svs",
                encoder="some/encoder",
                revision="abc123",
                pooling="cls",
                size=224,
                mpp=0.5,
                extent=(448.0, 448.0),
                slide_size=(9000, 9000),
                features=features,
                xy=np.zeros((len(features), 2), np.int64),
                valid=valid,
            )
        )
    return bags, labels, [f"case{i // 2}" for i in range(n)]


def write_cohort(folder: Path, bags: list[SlideFeatures], labels: list[str], cases: list[str]) -> tuple[Path, Path]:
    """The folder of features and the CSV that names the slides by their stems."""
    for bag in bags:
        bag.save(features_path(folder / "features", bag.slide))
    with open(folder / "labels.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide", "case", "label"])
        table.writerows(zip([Path(bag.slide).stem for bag in bags], cases, labels))
    return folder / "features", folder / "labels.csv"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `train_mil` made of the cohort, and the folder that holds its features, table and output."""
    folder = tmp_path_factory.mktemp("mil")
    features, table = write_cohort(folder, *cohort())
    return train_mil(features, table, folder / "out", folds=4, training=QUICK), folder


def test_witness_tiles_are_found_and_get_the_attention(trained):
    result, folder = trained
    assert result.validation.auc.value > 0.9 and result.validation.auc.low > 0.8
    assert not result.missing
    bag = SlideFeatures.load(folder / "features" / "site" / "slide02.svs.features.safetensors")
    tiles = torch.from_numpy(bag.features[bag.valid])
    scores = load_head(folder / "out" / "head")(tiles.unsqueeze(0)).tile_scores[0]
    assert sorted(scores.topk(3).indices.tolist()) == [0, 1, 2]


def test_shuffled_labels_are_not_learned():
    bags, labels, cases = cohort(60)
    shuffled = np.random.default_rng(4).permutation(labels[::2]).repeat(2).tolist()
    auc = cross_validate(bags, shuffled, cases, folds=3, training=QUICK).auc
    assert auc.low < 0.5 < auc.high


def test_no_slide_is_judged_by_a_head_that_saw_its_case(trained):
    validation = trained[0].validation
    folds_of_case = {case: set() for case in validation.cases}
    for case, fold in zip(validation.cases, validation.fold):
        folds_of_case[case].add(int(fold))
    assert all(len(folds) == 1 for folds in folds_of_case.values())
    assert set(validation.fold.tolist()) == {0, 1, 2, 3}


def test_the_seed_decides_everything_and_the_global_generator_is_left_alone():
    bags, labels, _ = cohort(8)
    training = HeadTraining(epochs=2, max_tiles=10, seed=7)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = train_head(bags, labels, training=training)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    again = train_head(bags, labels, training=training)
    other = train_head(bags, labels, training=replace(training, seed=8))
    assert np.array_equal(class_probabilities(first, bags), class_probabilities(again, bags))
    assert not np.array_equal(class_probabilities(first, bags), class_probabilities(other, bags))


def test_the_scale_of_the_features_does_not_matter():
    bags, labels, cases = cohort(24)
    scaled = [replace(bag, features=bag.features * 255 + 1000) for bag in bags]
    plain = cross_validate(bags, labels, cases, folds=2, training=QUICK).probabilities
    np.testing.assert_allclose(
        cross_validate(scaled, labels, cases, folds=2, training=QUICK).probabilities, plain, atol=0.02
    )


def test_encoders_are_compared_on_the_same_folds():
    bags, labels, cases = cohort(24)
    colours = [replace(bag, features=bag.features[:, 5:8], encoder="mean colour", revision="") for bag in bags]
    good = cross_validate(bags, labels, cases, folds=3, training=QUICK)
    poor = cross_validate(colours, labels, cases, folds=3, training=QUICK)
    assert np.array_equal(good.fold, poor.fold)
    difference = auc_difference(cases, good.targets, good.probabilities, poor.probabilities, seed=0)
    assert difference.value == pytest.approx(good.auc.value - poor.auc.value)
    assert difference.low > 0


def test_predictions_and_metrics_are_written(trained):
    result, folder = trained
    with open(folder / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["slide", "case", "label", "fold", "prob_normal", "prob_tumour"]
    assert len(rows) == 40
    assert all(float(row["prob_normal"]) + float(row["prob_tumour"]) == pytest.approx(1.0) for row in rows)
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert metrics["auc"]["value"] == result.validation.auc.value
    assert len(metrics["folds"]) == 4 and set(metrics["folds"][0]) == {"accuracy", "balanced_accuracy", "roc_auc"}
    assert metrics["slides"] == {"normal": 20, "tumour": 20} and metrics["cases"] == 20
    assert metrics["features"]["encoder"] == "some/encoder" and metrics["training"]["epochs"] == 20


def test_the_head_knows_its_classes_and_its_features(trained):
    config = load_head(trained[1] / "out" / "head").config
    assert config.id2label == {0: "normal", 1: "tumour"} and config.problem_type == "single_label_classification"
    assert (config.encoder, config.encoder_revision, config.pooling) == ("some/encoder", "abc123", "cls")
    assert (config.mpp, config.tile_size, config.input_dim) == (0.5, 224, 16)


def test_a_saved_head_predicts_what_it_predicted_in_memory(trained):
    result, folder = trained
    slides = ["site/slide03.svs", "site/slide00.svs"]
    table, missing = predict(folder / "out" / "head", folder / "features", [*slides, "site/absent.svs"])
    bags = [SlideFeatures.load(features_path(folder / "features", slide)) for slide in slides]
    assert np.array_equal(table[["prob_normal", "prob_tumour"]].to_numpy(), class_probabilities(result.head, bags))
    assert table["slide"].tolist() == slides and table["predicted"].tolist() == ["tumour", "normal"]
    assert len(missing) == 1 and "site/absent.svs has no features" in missing[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "other/encoder", "revision": "def"}, "on encoder some/encoder, but .* encoder other/encoder"),
        ({"revision": "def"}, "on encoder revision abc123, but .* encoder revision def"),
        ({"pooling": "mean"}, "on pooling cls, but .* pooling mean"),
        ({"mpp": 1.0}, "on mpp 0.5, but .* mpp 1.0"),
        ({"size": 256}, "on tile size 224, but .* tile size 256"),
        (
            {"features": np.zeros((5, 8), np.float32), "valid": np.ones(5, bool), "xy": np.zeros((5, 2), np.int64)},
            "on feature length 16, but .* 8",
        ),
    ],
)
def test_features_of_another_kind_are_refused_with_both_names(trained, tmp_path, change, message):
    bag = replace(cohort(1)[0][0], **change)
    bag.save(features_path(tmp_path, bag.slide))
    with pytest.raises(UserError, match=message):
        predict(trained[1] / "out" / "head", tmp_path, [bag.slide])


def test_an_encoder_that_moved_to_another_folder_is_the_same_encoder(trained, tmp_path):
    bag = replace(cohort(1)[0][0], encoder="/elsewhere/encoder")
    bag.save(features_path(tmp_path, bag.slide))
    table, _ = predict(trained[1] / "out" / "head", tmp_path, [bag.slide])
    assert len(table) == 1


def test_a_folder_without_a_head_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no head"):
        load_head(tmp_path)


def test_a_label_with_one_case_is_refused_before_anything_is_written(tmp_path):
    bags, labels, cases = cohort(6)
    features, table = write_cohort(tmp_path, bags, ["tumour"] * 2 + ["normal"] * 4, cases)
    with pytest.raises(UserError, match="label tumour has only 1 case"):
        train_mil(features, table, tmp_path / "out", folds=2, training=QUICK)
    assert not (tmp_path / "out").exists()


def test_slides_that_cannot_be_used_are_named_and_unlabelled_ones_passed_over(tmp_path):
    bags, labels, cases = cohort(6)
    bags[1] = replace(bags[1], valid=np.zeros_like(bags[1].valid))
    features, table = write_cohort(tmp_path, bags, ["", *labels[1:]], ["", "", *cases[2:]])
    with open(table, "a") as file:
        file.write("slide99,case99,normal\n")
    data = read_labelled_bags(features, table)
    assert [bag.slide for bag in data.bags] == [bag.slide for bag in bags[2:]]
    assert len(data.missing) == 2
    assert "slide99 has no features" in data.missing[0]
    assert "site/slide01.svs has no tile that could be read" in data.missing[1]


def test_a_slide_that_is_named_twice_is_refused(tmp_path):
    bags, labels, cases = cohort(2)
    features, table = write_cohort(tmp_path, bags, labels, cases)
    with open(table, "a") as file:
        file.write("site/slide00.svs,case0,normal\n")
    with pytest.raises(UserError, match="keep one row for each slide"):
        read_labelled_bags(features, table)


def test_a_loss_that_is_not_a_number_stops_the_training():
    bags, labels, _ = cohort(8)
    with pytest.raises(UserError, match="the loss became .*: lower the learning rate"):
        train_head(bags, labels, training=HeadTraining(epochs=20, learning_rate=1e30))


def test_features_that_are_not_numbers_are_refused_by_slide():
    bags, labels, _ = cohort(4)
    bags[2].features[5, 3] = np.inf
    with pytest.raises(UserError, match="slide02.svs has features that are not finite"):
        train_head(bags, labels, training=QUICK)


def test_training_runs_under_accelerate_launch(tmp_path):
    recipes = Path(__file__).parents[2] / "recipes"
    features, table = write_cohort(tmp_path, *cohort(8))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    options = ["--features", features, "--cohort", table, "--folds", "2", "--epochs", "1", "--out", tmp_path / "out"]
    done = subprocess.run(
        [*launch, recipes / "train_mil.py", *options],
        env={**os.environ, "PYTHONPATH": str(recipes.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "ROC-AUC of unseen cases" in done.stdout, done.stderr
    assert load_head(tmp_path / "out" / "head").config.num_labels == 2


def test_the_prediction_script_classifies_what_it_can_and_names_the_rest(trained, tmp_path):
    bags, _, _ = cohort(3)
    bags[1] = replace(bags[1], valid=np.zeros_like(bags[1].valid))
    for bag in bags:
        bag.save(features_path(tmp_path / "features", bag.slide))
    options = {"--head": trained[1] / "out" / "head", "--features": tmp_path / "features", "--out": tmp_path / "p.csv"}
    with pytest.raises(UserError, match="site/slide01.svs has no tile that could be read"):
        predict_slides.main([str(word) for pair in options.items() for word in pair])
    assert [line.split(",")[0] for line in (tmp_path / "p.csv").read_text().splitlines()] == [
        "slide",
        "site/slide00.svs",
        "site/slide02.svs",
    ]
