"""Judging an encoder in training: right numbers, the release's features, and no trace left in the training."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hf_pathology.evaluation.tile_probe import (
    TileJudge,
    embed_tiles,
    evaluating,
    logistic_predictions,
    resized_tiles,
)
from hf_pathology.features.encoder import Encoder
from hf_pathology.tiles.folder import TileDataset, read_tile_folder


NORM = {"mean": (0.7, 0.6, 0.5), "std": (0.2, 0.25, 0.3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 tiles of 40 px in three classes of 1, 3 and 6 groups a split; the class is the scale of a noise, not a colour."""
    folder = tmp_path_factory.mktemp("labelled")
    rng, rows = np.random.default_rng(0), ["path,class,group,split"]
    for label, (name, groups) in enumerate((("fine", 1), ("middle", 3), ("coarse", 6))):
        for split in ("train", "val"):
            for group in range(groups):
                for copy in range(3):
                    grain = 2**label
                    noise = rng.integers(60, 200, (40 // grain, 40 // grain, 3)).astype(np.uint8)
                    path = f"{name}_{split}_{group}_{copy}.png"
                    Image.fromarray(np.kron(noise, np.ones((grain, grain, 1), np.uint8))).save(folder / path)
                    rows.append(f"{path},{name},{name}_{split}_{group},{split}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def judge_of(folder, features_of, **changes):
    tiles = read_tile_folder(folder)
    options = {"size": 40, "k": 3, **NORM, **changes}
    return TileJudge(TileDataset(tiles.subset("train")), TileDataset(tiles.subset("val")), features_of, **options)


class Roughness(nn.Module):
    """Knows the classes: how much neighbouring pixels differ. Has weights so that it has a device."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixels):
        across, twice = (pixels.diff(dim=3).abs().mean(dim=(1, 2, 3)), (pixels[..., 2:] - pixels[..., :-2]).abs())
        features = torch.stack([across, twice.mean(dim=(1, 2, 3))], dim=1) * self.scale
        return features - 0.25


def of_model(model, pixels):
    return model(pixels)


def tiny_vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=0.3,
    )
    return ViTModel(config, add_pooling_layer=False)


def class_token(model, pixels):
    return model(pixels).last_hidden_state[:, 0]


def test_an_encoder_that_knows_the_classes_is_told_from_one_that_does_not(folder):
    judge = judge_of(folder, of_model)
    assert judge(Roughness()) == {"knn_accuracy": 1.0, "knn_balanced_accuracy": 1.0}

    generator = torch.Generator().manual_seed(0)

    def noise(model, pixels):
        return torch.randn(len(pixels), 8, generator=generator)

    found = judge_of(folder, noise)(Roughness())
    assert found["knn_accuracy"] < 0.75 and found["knn_balanced_accuracy"] < 0.6


def test_balanced_accuracy_is_the_mean_recall_of_the_classes(folder):
    judge = judge_of(folder, of_model)
    judge.predict = lambda encoder: np.zeros(30, np.int64)  # all are called "coarse", the first class
    assert judge(Roughness()) == {"knn_accuracy": 18 / 30, "knn_balanced_accuracy": pytest.approx(1 / 3)}


def test_features_are_those_of_the_release_of_the_encoder(folder):
    vit = tiny_vit()
    judge = judge_of(folder, class_token, size=32, batch_size=7)
    tiles = np.stack([item["tiles"] for item in TileDataset(read_tile_folder(folder).subset("val"))])
    release = Encoder(vit.eval(), "tiny", "0", "cls", 32, None, **NORM)
    _, asked = judge.features(vit)
    torch.testing.assert_close(asked, release(torch.from_numpy(tiles)), atol=1e-6, rtol=0)


def test_a_network_with_a_pooled_map_can_be_judged(folder):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    judge = judge_of(folder, lambda model, pixels: model(pixels).pooler_output.flatten(1), size=32)
    known, asked = judge.features(ResNetModel(config))
    assert known.shape == asked.shape == (30, 16)


def test_judging_leaves_no_trace_in_the_training(folder):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model[1].eval()  # frozen statistics, as some recipes have them
    judge = judge_of(folder, of_model, size=16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    first = judge.features(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(judge.features(model), first, atol=0, rtol=0)


def test_modes_come_back_after_an_error_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training and not model[1].training
        raise RuntimeError
    assert model.training and model[1].training and not model[0].training


def test_judging_in_bfloat16_is_close_and_takes_no_gradient_from_a_step_around_it():
    model, tiles = nn.Linear(12, 4), torch.randint(256, (5, 3, 2, 2), dtype=torch.uint8)

    def flat(model, pixels):
        return model(pixels.flatten(1))

    exact = embed_tiles(model, tiles, flat, **NORM)
    with torch.autocast("cpu", torch.bfloat16):
        half = embed_tiles(model, tiles, flat, dtype=torch.bfloat16, **NORM)
        model(torch.ones(1, 12)).sum().backward()
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.02)
    assert (model.weight.grad == 1).all()


def test_tiles_are_resized_once_with_their_labels(folder):
    items = TileDataset(read_tile_folder(folder))
    tiles, labels = resized_tiles(items, 20)
    assert tiles.shape == (60, 3, 20, 20) and tiles.dtype == torch.uint8
    assert labels.tolist() == read_tile_folder(folder).labels.tolist()
    as_they_are, _ = resized_tiles(items, 40)
    np.testing.assert_array_equal(as_they_are[17].permute(1, 2, 0), items[17]["tiles"])
    means = as_they_are.float().mean(dim=(2, 3)) - tiles.float().mean(dim=(2, 3))
    assert means.abs().max() < 1.5


def copies(n_groups, seed, flipped=0.0):
    """Groups of six copies; the class is in the first of 40 features, the others are noise that the copies share."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n_groups) % 2
    features = rng.normal(size=(n_groups, 40))
    features[:, 0] += 1.5 * (2 * labels - 1)
    repeated = np.repeat(features, 6, axis=0) + 0.01 * rng.normal(size=(6 * n_groups, 40))
    labels = np.where(rng.random(n_groups) < flipped, 1 - labels, labels)
    return repeated, np.repeat(labels, 6), np.repeat(np.arange(n_groups), 6)


@pytest.mark.filterwarnings("error")  # it converges
def test_the_strength_of_regression_is_chosen_without_copies_on_both_sides():
    train, labels, groups = copies(60, seed=0, flipped=0.2)
    test, expected, _ = copies(400, seed=1)
    by_group = np.mean(logistic_predictions(train, labels, groups, test) == expected)
    by_tile = np.mean(logistic_predictions(train, labels, np.arange(len(train)), test) == expected)
    assert by_group > by_tile + 0.05  # with copies on both sides, what fits single groups looks best


def test_regression_does_not_depend_on_the_scale_of_a_feature():
    train, labels, groups = copies(40, seed=0)
    test, _, _ = copies(50, seed=1)
    scales = 10.0 ** np.linspace(-3, 3, 40)
    np.testing.assert_array_equal(
        logistic_predictions(train, labels, groups, test),
        logistic_predictions(train * scales + 5, labels, groups, test * scales + 5),
    )


def test_with_groups_the_judge_says_how_sure_it_is(folder):
    groups = read_tile_folder(folder).subset("val").groups
    features_of = lambda encoder, pixels: encoder(pixels)  # noqa: E731
    alone = judge_of(folder, features_of)(Roughness())
    found = judge_of(folder, features_of, groups=groups)(Roughness())
    assert {name: found[name] for name in alone} == alone and set(alone) == {"knn_accuracy", "knn_balanced_accuracy"}
    assert found["knn_accuracy_low"] <= found["knn_accuracy"] <= found["knn_accuracy_high"]
    assert (found["knn_tiles"], found["knn_groups"]) == (30, 10)
    of_one = judge_of(folder, features_of, groups=["same"] * 30)(Roughness())
    assert of_one["knn_groups"] == 1 and "knn_accuracy_low" not in of_one
