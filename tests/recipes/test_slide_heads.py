"""HIPT's heads as a user trains them: they see what lies together, start from a second level, and refuse what does not fit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hierarchies import release_hierarchy
from programs import run_command
from transformers import AutoModel

from hf_pathology.errors import UserError
from hf_pathology.features.bags import draw_batch, tiles_of
from hf_pathology.features.encoder import load_encoder
from hf_pathology.features.regions import region_features
from hf_pathology.features.store import SlideFeatures, features_path
from hf_pathology.hub_upload.export_hipt import export_region_encoder
from hf_pathology.modeling.configuration_hipt import HiptRegionConfig
from hf_pathology.modeling.modeling_hipt import HiptRegionModel
from hf_pathology.recipes.predict_slides import class_probabilities, load_head, whole_slide
from hf_pathology.recipes.slide_heads import HeadOptions, new_head
from hf_pathology.recipes.train_mil import HeadTraining, cross_validate, train_head, train_mil


REGION, WIDTH = 4, 16  # tiles along a region; of a feature vector
TILES = REGION**2
QUICK = HeadTraining(batch_size=8)


def slide(number: int, gathered: bool) -> SlideFeatures:
    """Four regions of two kinds of tiles, half and half: two regions of each kind, or all mixed. One tile is unreadable."""
    generator = np.random.default_rng(number)
    kinds = np.repeat([-2.0, 2.0], 2 * TILES)
    if not gathered:
        kinds = generator.permuted(
            kinds.reshape(2, -1, TILES // 2).transpose(1, 0, 2).reshape(4, TILES), axis=1
        ).ravel()
    features = generator.normal(size=(4 * TILES, WIDTH)).astype(np.float32)
    features[:, 0] += kinds
    valid = np.ones(len(features), bool)
    valid[0] = False
    features[0] = np.nan
    corners = np.stack([np.arange(len(features)), np.zeros(len(features))], axis=1).astype(np.int64) * 32
    return SlideFeatures(
        slide=f"slide{number:02d}.svs",
        encoder="some/encoder",
        revision="abc123",
        pooling="cls",
        size=32,
        mpp=0.5,
        extent=(32.0, 32.0),
        slide_size=(9000, 9000),
        features=features,
        xy=corners,
        valid=valid,
        region=REGION,
    )


def cohort(slides: int = 24) -> tuple[list[SlideFeatures], list[str], list[str]]:
    labels = [("mixed", "gathered")[number % 2] for number in range(slides)]
    bags = [slide(number, label == "gathered") for number, label in enumerate(labels)]
    return bags, labels, [bag.slide for bag in bags]


@pytest.mark.parametrize(("head", "epochs"), [("hipt", 12), ("hipt_attention", 80)])
def test_a_head_over_regions_sees_what_lies_together(head, epochs):
    training = replace(QUICK, epochs=epochs)
    validation = cross_validate(*cohort(), folds=2, training=training, options=HeadOptions(head))
    assert validation.auc.low > 0.5 and validation.auc.value > 0.8


def test_a_head_over_tiles_does_not():
    auc = cross_validate(*cohort(), folds=2, training=replace(QUICK, epochs=80)).auc
    assert auc.low < 0.5 < auc.high


@pytest.mark.parametrize("head", ["abmil", "dsmil", "deep_attn_misl", "deep_graph_conv"])
def test_a_head_over_tiles_finds_the_few_that_tell(head):
    """Four of 64 tiles of every other slide are of a kind of their own, which lies on no side of the others."""
    bags, labels, cases = cohort(48)
    for bag, label in zip(bags, labels):
        bag.features[:, 0] = np.sign(bag.features[:, 0]) * 3
        if label == "gathered":
            bag.features[5:9, 0] = 0.0
            bag.features[5:9, 1:4] += 6.0
    training = replace(QUICK, epochs=30)
    validation = cross_validate(bags, labels, cases, folds=2, training=training, options=HeadOptions(head))
    assert validation.auc.low > 0.5 and validation.auc.value > 0.8


def test_clusters_are_the_same_for_the_same_seed_and_need_tiles():
    bags, labels, _ = cohort(4)
    options, training = HeadOptions("deep_attn_misl"), HeadTraining(epochs=1)
    first, again = (train_head(bags, labels, training=training, options=options) for _ in range(2))
    assert torch.equal(first.cluster_centres, again.cluster_centres)
    assert first.cluster_centres.unique(dim=0).shape == (10, WIDTH)
    few = [replace(bag, valid=np.arange(len(bag)) == 1) for bag in bags]
    with pytest.raises(UserError, match="4 tiles in all make no 10 clusters"):
        train_head(few, labels, training=training, options=options)


@pytest.mark.parametrize("region_tiles", [1, TILES])
def test_batches_hold_what_a_head_is_to_see(region_tiles):
    bags = [slide(0, True), replace(slide(1, True), valid=np.arange(4 * TILES) >= TILES)]
    parts = [tiles_of(bag, region_tiles) for bag in bags]
    features, mask = draw_batch(parts)
    readable = [bag.features[bag.valid] for bag in bags]
    for row, tiles in enumerate(readable):
        assert torch.equal(features[row, mask[row]], torch.from_numpy(tiles))
    assert not features[~mask].any()
    if region_tiles > 1:
        assert [len(part) for part in parts] == [4, 3] and features.shape[1] == 4 * TILES
    drawn, mask = draw_batch(parts, 2)
    assert drawn.shape == (2, 2 * region_tiles, WIDTH)


def test_a_trained_head_is_saved_and_finds_the_tiles_of_its_scores(tmp_path):
    bags, labels, _ = cohort(8)
    for bag in bags:
        bag.save(features_path(tmp_path / "features", bag.slide))
    rows = [f"{bag.slide},{label}" for bag, label in zip(bags, labels)]
    (tmp_path / "labels.csv").write_text("\n".join(["slide,label", *rows]))
    words = ["--features", tmp_path / "features", "--cohort", tmp_path / "labels.csv", "--out", tmp_path / "out"]
    done = run_command("train-mil", *words, "--folds", 2, "--epochs", 1, "--head", "hipt")
    assert done.returncode == 0, done.stderr
    head = load_head(tmp_path / "out" / "head")
    scores = whole_slide(head, bags[0]).tile_scores[0]
    assert scores.shape == (bags[0].valid.sum(),) and scores.sum().item() == pytest.approx(1, abs=1e-5)
    words = ["--head", tmp_path / "out" / "head", "--features", tmp_path / "features", "--out", tmp_path / "p.csv"]
    assert run_command("predict", *words).returncode == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 9


@pytest.fixture(scope="module")
def hierarchy(tmp_path_factory) -> Path:
    return release_hierarchy(tmp_path_factory.mktemp("release") / "hierarchy")


def test_a_second_level_that_is_there_is_the_start_and_stays_where_it_is_frozen(hierarchy):
    bags, labels, _ = cohort(8)
    bags = [replace(bag, revision=load_encoder(hierarchy).revision) for bag in bags]
    start = AutoModel.from_pretrained(hierarchy).region_encoder.state_dict()
    new = new_head(HeadOptions("hipt", str(hierarchy)), bags[0], [], ["gathered", "mixed"])
    assert new.config.hidden_size == 12 and not new.feature_mean.any() and (new.feature_std == 1).all()
    training = HeadTraining(epochs=2)
    frozen = train_head(bags, labels, training=training, options=HeadOptions("hipt", str(hierarchy), True))
    moved = train_head(bags, labels, training=training, options=HeadOptions("hipt", str(hierarchy)))
    for name, weight in start.items():
        assert torch.equal(new.regions.encoder.state_dict()[name], weight)
        assert torch.equal(frozen.regions.encoder.state_dict()[name], weight)
    after = moved.regions.encoder.state_dict()
    assert any(not torch.equal(after[name], weight) for name, weight in start.items())


def test_a_second_level_of_any_width_is_a_start(tmp_path):
    region = HiptRegionConfig(
        input_size=WIDTH, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, grid_size=4
    )
    export_region_encoder(HiptRegionModel(region), tmp_path / "regions")
    bags, labels, _ = cohort(4)
    options = HeadOptions("hipt", str(tmp_path / "regions"))
    head = train_head(bags, labels, training=HeadTraining(epochs=1), options=options)
    assert (head.config.hidden_size, head.config.num_attention_heads) == (16, 2)


def test_features_of_regions_need_no_second_level(hierarchy):
    encoder = load_encoder(hierarchy)
    bags = [region_features(bag, encoder) for bag in cohort(8)[0]]
    labels = cohort(8)[1]
    head = train_head(bags, labels, training=HeadTraining(epochs=1), options=HeadOptions("hipt"))
    assert head.config.region_tiles == 1 and head.config.input_dim == 12
    assert class_probabilities(head, bags).shape == (8, 2)


def test_mistakes_are_told(hierarchy, tmp_path):
    bags, labels, _ = cohort(4)
    singles = [replace(bag, region=1) for bag in bags]
    quick = {"training": HeadTraining(epochs=1)}
    with pytest.raises(UserError, match="features of single tiles, and the head hipt is over regions: embed with"):
        train_head(singles, labels, options=HeadOptions("hipt"), **quick)
    head = train_head(bags, labels, options=HeadOptions("hipt_attention"), **quick)
    with pytest.raises(UserError, match="slide00.svs has regions of 1 tiles, and the head is for regions of 16"):
        class_probabilities(head, singles)
    cut = [replace(bag, **{name: getattr(bag, name)[:-1] for name in ("features", "xy", "valid")}) for bag in bags]
    with pytest.raises(UserError, match="slide00.svs has 63 tiles, no whole regions of 16: embed it again"):
        class_probabilities(head, cut)
    with pytest.raises(
        UserError, match="head is 'clam': choose one of abmil, dsmil, deep_attn_misl, deep_graph_conv, hipt"
    ):
        HeadOptions("clam")
    with pytest.raises(UserError, match="the head abmil has no second level to start with"):
        HeadOptions("abmil", "somewhere")
    with pytest.raises(UserError, match="freeze_regions would leave random weights as they are"):
        HeadOptions("hipt", freeze_regions=True)
    with pytest.raises(UserError, match="cannot be loaded as a hierarchy"):
        train_head(bags, labels, options=HeadOptions("hipt", str(tmp_path)), **quick)
    longer = [replace(bag, features=np.tile(bag.features, 2)) for bag in bags]
    with pytest.raises(UserError, match="takes features of length 16, and those of slide00.svs have 32"):
        train_head(longer, labels, options=HeadOptions("hipt", str(hierarchy)), **quick)
    config = (hierarchy / "config.json").read_text().replace('"tile_revision": null', '"tile_revision": "other"')
    other = tmp_path / "other"
    other.mkdir()
    for file in hierarchy.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(config)
    with pytest.raises(UserError, match="is for features by revision other, and those of slide00.svs are by some/enc"):
        train_head(bags, labels, options=HeadOptions("hipt", str(other)), **quick)


def test_the_record_says_which_head_it_was(tmp_path):
    bags, labels, _ = cohort(6)
    for bag in bags:
        bag.save(features_path(tmp_path / "features", bag.slide))
    rows = [f"{bag.slide},{label}" for bag, label in zip(bags, labels)]
    (tmp_path / "labels.csv").write_text("\n".join(["slide,label", *rows]))
    result = train_mil(
        tmp_path / "features",
        tmp_path / "labels.csv",
        tmp_path / "out",
        folds=2,
        training=HeadTraining(epochs=1),
        options=HeadOptions("hipt_attention"),
    )
    assert result.head.config.local == "attention"
    assert '"head": "hipt_attention"' in (tmp_path / "out" / "metrics.json").read_text()
