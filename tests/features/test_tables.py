"""Bags as datasets and as AnnData: everything that is known of a slide survives, bit by bit."""

import os
import subprocess
import sys
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars, enable_progress_bars, load_from_disk
from huggingface_hub import DatasetCard
from loopback_hub import hub_environment, loopback_hub

from hf_pathology.errors import UserError
from hf_pathology.features.store import SlideFeatures, features_path
from hf_pathology.features.tables import from_dataset, saved_bags, to_anndata, to_dataset


@pytest.fixture(autouse=True)
def no_progress_bars():
    disable_progress_bars()
    yield
    enable_progress_bars()


def bag(slide: str, tiles: int, dtype: str = "float32", width: int = 7) -> SlideFeatures:
    rng = np.random.default_rng(tiles)
    features = rng.normal(size=(tiles, width)).astype(dtype)
    features[1] = np.nan
    valid = np.arange(tiles) != 1
    xy = rng.integers(0, 2**40, (tiles, 2))
    return SlideFeatures(slide, "e", "r", "cls", 224, 0.1 + 0.2, (448.1, 448.0), (99_000, 90_000), features, xy, valid)


def assert_same(found: list[SlideFeatures], expected: list[SlideFeatures]) -> None:
    assert [bag.slide for bag in found] == [bag.slide for bag in expected]
    for one, right in zip(found, expected):
        for each in fields(SlideFeatures):
            value, known = getattr(one, each.name), getattr(right, each.name)
            if isinstance(known, np.ndarray):
                assert (value.dtype, value.shape) == (known.dtype, known.shape), each.name
                assert value.tobytes() == known.tobytes(), each.name
            else:
                assert value == known and type(value) is type(known), each.name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("per", ["slide", "tile"])
def test_bags_come_back_bit_by_bit_from_every_way_of_keeping_a_dataset(tmp_path, per, dtype):
    bags = [bag("b.svs", 5, dtype), bag("a.svs", 9, dtype)]
    dataset = to_dataset(bags, per)
    assert len(dataset) == (2 if per == "slide" else 14)
    assert_same(from_dataset(dataset), bags)
    assert_same(from_dataset(to_dataset(iter(bags), per, tmp_path / "bags.arrow")), bags)
    dataset.save_to_disk(tmp_path / "disk")
    assert_same(from_dataset(load_from_disk(tmp_path / "disk")), bags)
    dataset.to_parquet(tmp_path / "bags.parquet")
    parquet = Dataset.from_parquet(str(tmp_path / "bags.parquet"), cache_dir=str(tmp_path / "cache"))
    assert parquet.features == dataset.features
    assert_same(from_dataset(parquet), bags)


def test_columns_are_declared_with_their_types():
    tile = to_dataset([bag("a.svs", 5, "float16")], "tile").features
    assert (tile["feature"].feature.dtype, tile["feature"].length) == ("float16", 7)
    assert (tile["x"].dtype, tile["valid"].dtype, tile["mpp"].dtype) == ("int64", "bool", "float64")
    slide = to_dataset([bag("a.svs", 5)], "slide").features
    assert (slide["features"].feature.feature.dtype, slide["features"].feature.length) == ("float32", 7)


def test_a_row_says_what_a_reader_without_this_package_needs():
    known = bag("a.svs", 5)
    row = to_dataset([known], "tile")[2]
    assert (row["slide"], row["encoder"], row["mpp"], row["extent"]) == ("a.svs", "e", known.mpp, [448.1, 448.0])
    assert [row["x"], row["y"]] == known.xy[2].tolist() and row["feature"] == known.features[2].tolist()


def test_selected_and_mixed_rows_find_their_slides_again():
    bags = [bag("b.svs", 5), bag("a.svs", 9)]
    assert_same(from_dataset(to_dataset(bags).select([1, 0])), bags[::-1])
    mixed = from_dataset(to_dataset(bags, "tile").select([13, 1, 0, 6]))
    first = replace(bags[1], **{name: getattr(bags[1], name)[[8, 1]] for name in ("features", "xy", "valid")})
    second = replace(bags[0], **{name: getattr(bags[0], name)[[1, 0]] for name in ("features", "xy", "valid")})
    assert_same(mixed, [first, second])


def test_a_folder_is_converted_one_bag_at_a_time(tmp_path):
    keys = [f"{number}.svs" for number in range(6)]
    for number, key in enumerate(keys):
        bag(key, 5 + number).save(features_path(tmp_path / "features", key))
    held = []

    def watched():
        for each in saved_bags(tmp_path / "features"):
            held.append(weakref.ref(each))
            assert sum(bag() is not None for bag in held) <= 3  # the first, the one handed out, the next
            yield each

    dataset = to_dataset(watched(), "slide", tmp_path / "out" / "bags.arrow")
    assert len(held) == 6 and [each.slide for each in from_dataset(dataset)] == keys
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["bags.arrow"]
    assert dataset.cache_files == [{"filename": str(tmp_path / "out" / "bags.arrow")}]


def test_what_does_not_fit_in_one_dataset_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="b.svs has features of 8 numbers as float32, unlike the slides before"):
        to_dataset([bag("a.svs", 5), bag("b.svs", 5, width=8)])
    with pytest.raises(UserError, match="b.svs has features of 7 numbers as float16"):
        to_dataset([bag("a.svs", 5), bag("b.svs", 5, "float16")], "tile", tmp_path / "bags.arrow")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no bags"):
        to_dataset([])
    with pytest.raises(UserError, match="per is 'case'"):
        to_dataset([bag("a.svs", 5)], "case")
    with pytest.raises(UserError, match="columns text holds no slide features"):
        from_dataset(Dataset.from_dict({"text": ["a"]}))


def test_anndata_holds_the_features_the_centres_and_where_they_come_from(tmp_path):
    anndata = pytest.importorskip("anndata")
    known = bag("a.svs", 5)
    to_anndata(known).write_h5ad(tmp_path / "a.h5ad")
    table = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert table.X.tobytes() == known.features.tobytes()
    assert np.array_equal(table.obs[["x", "y"]], known.xy) and np.array_equal(table.obs["valid"], known.valid)
    assert np.array_equal(table.obsm["spatial"], known.xy + (224.05, 224.0))
    found = table.uns["hf_pathology"]
    assert (found["slide"], found["encoder"], found["mpp"]) == ("a.svs", "e", known.mpp)
    assert found["extent"].tolist() == [448.1, 448.0] and found["slide_size"].tolist() == [99_000, 90_000]


def test_without_anndata_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(UserError, match=r"pip install hf_pathology\[anndata\]"):
        to_anndata(bag("a.svs", 5))


PUSH_AND_LOAD = """
import sys
from datasets import load_dataset
from hf_pathology.features.store import features_path
from hf_pathology.features.tables import from_dataset
from hf_pathology.hub_upload.push_features import push_features

push_features(sys.argv[1], "org/bags", sys.argv[2])
for bag in from_dataset(load_dataset("org/bags", split="train")):
    bag.save(features_path(sys.argv[3], bag.slide))
"""


@pytest.mark.parametrize("per", ["slide", "tile"])
def test_bags_come_back_bit_by_bit_from_the_hub(tmp_path, per):
    bags = [bag("a.svs", 9), bag("b.svs", 5)]
    for each in bags:
        each.save(features_path(tmp_path / "features", each.slide))
    with loopback_hub() as hub:
        environment = hub_environment(os.environ, hub, tmp_path / "home")
        command = [sys.executable, "-c", PUSH_AND_LOAD, tmp_path / "features", per, tmp_path / "back"]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    files = hub.dataset("org/bags").files
    card = DatasetCard(files["README.md"].decode())
    assert "org/bags" in card.text and "14 vectors of 7 numbers" in card.text and "pathology" in card.data.tags
    assert card.data.dataset_info["splits"][0]["num_examples"] == (2 if per == "slide" else 14)
    assert [name for name in files if name.endswith(".parquet")] == ["data/train-00000-of-00001.parquet"]
    assert_same(list(saved_bags(tmp_path / "back")), bags)
