"""Grids of features from files of ours and of HIPT: each region is found, whole and once, and what does not fit is refused."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_pathology.errors import UserError
from hf_pathology.features.region_blocks import RegionBlocks
from hf_pathology.features.store import SlideFeatures, features_path


EDGE, WIDTH = 2, 3


def bag(slide: str, regions: int, **changes) -> SlideFeatures:
    tiles = regions * EDGE**2
    features = np.random.default_rng(len(slide)).standard_normal((tiles, WIDTH)).astype(np.float32)
    return replace(
        SlideFeatures(
            slide=slide,
            encoder="e",
            revision="r",
            pooling="cls",
            size=8,
            mpp=0.5,
            extent=(8.0, 8.0),
            slide_size=(1000, 1000),
            features=features,
            xy=np.stack([np.arange(tiles) * 8, np.zeros(tiles, int)], axis=1),
            valid=np.ones(tiles, bool),
            region=EDGE,
        ),
        **changes,
    )


def save(folder, *bags):
    for each in bags:
        each.save(features_path(folder, each.slide))
    return bags


def test_every_region_is_a_block_with_its_slide_corner_and_grid(tmp_path):
    one, two = save(tmp_path, bag("a/one", 3), bag("two", 2))
    regions = RegionBlocks(tmp_path)
    assert (len(regions), regions.kind.grid, regions.kind.width, regions.slides) == (5, EDGE, WIDTH, ["a/one", "two"])
    assert regions.slide_of.tolist() == [0, 0, 0, 1, 1] and regions.xy[:, 0].tolist() == [0, 32, 64, 0, 32]
    np.testing.assert_array_equal(regions[1], one.features[4:8].reshape(2, 2, 3))
    rows = regions.read([4, 0])
    assert rows.slides == ["a/one", "two"]
    np.testing.assert_array_equal(rows.tiles[1], two.features[4:].reshape(2, 2, 3))
    assert regions.numbers(["two", "a/one"], np.array([[32, 0], [64, 0]])).tolist() == [4, 2]
    again = pickle.loads(pickle.dumps(regions))  # as for a worker
    np.testing.assert_array_equal(again[3], regions[3])
    assert again.fingerprint == regions.fingerprint != RegionBlocks(tmp_path, ["two"]).fingerprint


def test_regions_with_unreadable_tiles_are_left_out_and_counted(tmp_path):
    valid = np.ones(12, bool)
    valid[5] = False
    save(tmp_path, bag("one", 3, valid=valid))
    regions = RegionBlocks(tmp_path)
    assert regions.xy[:, 0].tolist() == [0, 64]
    assert regions.problems == ["one: 1 regions with tiles that could not be read are left out"]


def test_slides_are_chosen_by_their_keys(tmp_path):
    save(tmp_path, bag("one", 3), bag("two", 2), bag("three", 1))
    assert RegionBlocks(tmp_path, ["two", "one"]).slides == ["one", "two"]
    assert RegionBlocks(tmp_path, limit=1).slides == ["one"]
    with pytest.raises(UserError, match="has no features of four: run"):
        RegionBlocks(tmp_path, ["one", "four"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "s"}, r"mixes features: one has .*revision='r'.*, two has .*revision='s'"),
        ({"mpp": 1.0}, "mixes features"),
        ({"features": np.zeros((8, 5), np.float32)}, "mixes features"),
        ({"region": 1}, "mixes features"),
    ],
)
def test_features_of_two_kinds_are_refused(tmp_path, changes, message):
    save(tmp_path, bag("one", 2), bag("two", 2, **changes))
    with pytest.raises(UserError, match=message):
        RegionBlocks(tmp_path)


def test_features_of_single_tiles_and_of_no_whole_regions_are_refused(tmp_path):
    save(tmp_path / "tiles", bag("one", 2, region=1))
    with pytest.raises(UserError, match="holds features of tiles, not of regions"):
        RegionBlocks(tmp_path / "tiles")
    save(tmp_path / "odd", bag("one", 2, region=3))
    with pytest.raises(UserError, match="has 8 tiles, no whole regions of 9"):
        RegionBlocks(tmp_path / "odd")
    save(tmp_path / "bad", bag("one", 1, valid=np.zeros(4, bool)))
    with pytest.raises(UserError, match="holds no region whose tiles could all be read"):
        RegionBlocks(tmp_path / "bad")
    with pytest.raises(UserError, match="holds no features of slides"):
        RegionBlocks(tmp_path / "nothing")


def test_hipts_tensors_are_read_one_region_or_all_of_a_slide_to_a_file(tmp_path):
    grids = torch.randn(12, EDGE**2, WIDTH)
    (tmp_path / "alone").mkdir()
    (tmp_path / "together").mkdir()
    for number in range(11):
        torch.save(grids[number], tmp_path / "alone" / f"TCGA-1_x_{number}.pt")
    torch.save(grids[11], tmp_path / "alone" / "TCGA-2_0.pt")
    torch.save(grids[:11], tmp_path / "together" / "TCGA-1.pt")
    alone, together = RegionBlocks(tmp_path / "alone"), RegionBlocks(tmp_path / "together")
    assert alone.slides == ["TCGA-1_x", "TCGA-2"] and np.bincount(alone.slide_of).tolist() == [11, 1]
    assert (alone.kind.grid, alone.kind.width, alone.kind.encoder, alone.kind.mpp) == (EDGE, WIDTH, "unknown", None)
    for number in range(11):
        np.testing.assert_array_equal(alone[number], grids[number].view(EDGE, EDGE, WIDTH))
        np.testing.assert_array_equal(together[number], alone[number])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_tensors_of_whole_slides_stay_in_their_file_and_give_float32(tmp_path, dtype):
    grids = torch.randn(50, 16, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.save(grids, tmp_path / "a.pt")
    blocks = RegionBlocks(tmp_path)
    assert blocks[7].dtype == np.float32
    np.testing.assert_array_equal(blocks[7].reshape(16, 6), grids[7].float().numpy())
    assert len(pickle.dumps(blocks)) < grids.numel()  # a worker opens the file itself
    blocks[7][:] = 0
    assert np.any(blocks[7])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 5, 3), "has 5 tiles in a region, which form no square"),
        (torch.zeros(4, dtype=torch.int64), "features are floats"),
        ({"a": 1}, "holds a dict"),
    ],
)
def test_tensors_of_something_else_are_refused(tmp_path, tensor, message):
    torch.save(tensor, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        RegionBlocks(tmp_path)
