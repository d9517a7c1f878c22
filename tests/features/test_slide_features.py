"""Bags on the disk: whole, by rows, mapped, as float16, and damaged."""

from dataclasses import fields, replace

import numpy as np
import pytest

from hf_pathology.errors import UserError
from hf_pathology.features.store import SlideFeatures, features_path, load_cohort_features
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.store import save_arrays


def bag(slide: str = "site/a.svs", dtype: str = "float32") -> SlideFeatures:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(9, 5)).astype(dtype)
    features[4] = np.nan
    valid = np.arange(9) != 4
    xy = rng.integers(0, 100_000, (9, 2))
    return SlideFeatures(slide, "e", "r", "cls", 224, 0.1 + 0.2, (448.1, 448.0), (99_000, 90_000), features, xy, valid)


def assert_same(found: object, expected: object) -> None:
    """Field by field and bit by bit."""
    for each in fields(expected):
        value, right = getattr(found, each.name), getattr(expected, each.name)
        if isinstance(right, np.ndarray):
            assert (value.dtype, value.shape) == (right.dtype, right.shape), each.name
            assert value.tobytes() == right.tobytes(), each.name
        else:
            assert value == right and type(value) is type(right), each.name


@pytest.mark.parametrize("options", [{}, {"mapped": False}, {"verify": False}])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bag_comes_back_bit_by_bit(tmp_path, dtype, options):
    path = features_path(tmp_path, "site/a.svs")
    bag(dtype=dtype).save(path)
    assert_same(SlideFeatures.load(path, **options), bag(dtype=dtype))


def test_features_are_kept_as_float16_when_asked_and_stay_so_unless_asked(tmp_path):
    bag().save(tmp_path / "a", dtype="float16")
    half = bag().features.astype(np.float16)
    assert_same(SlideFeatures.load(tmp_path / "a"), replace(bag(), features=half))
    assert_same(SlideFeatures.load(tmp_path / "a", dtype="float32"), replace(bag(), features=half.astype(np.float32)))


def test_a_feature_too_large_for_float16_is_refused_with_its_slide(tmp_path):
    features = bag().features
    features[2, 3] = -70_000
    large = replace(bag(), features=features)
    with pytest.raises(
        UserError, match="site/a.svs has a feature of 70000, too large for float16: keep it as float32"
    ):
        large.save(tmp_path / "a", dtype="float16")
    assert not (tmp_path / "a").exists()
    large.save(tmp_path / "a")
    with pytest.raises(UserError, match="too large for float16"):
        SlideFeatures.load(tmp_path / "a", dtype="float16")


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("rows", [[7, 0, 3, 3], [], np.array([8]), np.arange(9) % 2 == 0])
def test_rows_are_those_of_the_whole_bag_in_the_order_asked_for(tmp_path, rows, mapped):
    bag().save(tmp_path / "a")
    parts = {name: getattr(bag(), name)[rows] for name in ("features", "xy", "valid")}
    assert_same(SlideFeatures.load(tmp_path / "a", rows, mapped=mapped), replace(bag(), **parts))


def test_rows_are_read_without_the_rest_unless_it_is_to_be_verified(tmp_path):
    bag().save(tmp_path / "a")
    content = bytearray((tmp_path / "a").read_bytes())
    content[content.index(bag().features[8].tobytes())] ^= 1
    (tmp_path / "a").write_bytes(content)
    assert np.array_equal(SlideFeatures.load(tmp_path / "a", [1, 2]).features, bag().features[[1, 2]])
    for options in ({"rows": [1, 2], "verify": True}, {}, {"mapped": False}):
        with pytest.raises(UserError, match="a cannot be read .the bytes of 'features' do not match"):
            SlideFeatures.load(tmp_path / "a", **options)


def test_a_whole_bag_is_mapped_and_cannot_be_written_to_unless_asked(tmp_path):
    bag().save(tmp_path / "a")
    assert not SlideFeatures.load(tmp_path / "a").features.flags.writeable
    assert SlideFeatures.load(tmp_path / "a", mapped=False).features.flags.writeable
    assert SlideFeatures.load(tmp_path / "a", [1, 2]).features.flags.writeable


def grid() -> TileGrid:
    rng = np.random.default_rng(0)
    xy, tissue = rng.integers(0, 100_000, (50, 2)), rng.random(50).astype(np.float32)
    extent = (448.1, 448.0)
    return TileGrid("a.svs", 224, 0.5, (0.25, 0.25), extent, extent, (99_000, 90_000), xy, tissue)


@pytest.mark.parametrize("original", [bag(), bag(dtype="float16"), grid()], ids=["float32", "float16", "grid"])
def test_a_damaged_file_is_refused_or_harmless(tmp_path, original):
    path, rng = tmp_path / "a", np.random.default_rng(0)
    original.save(path)
    content = path.read_bytes()
    for trial in range(200):
        place = int(rng.integers(len(content)))
        flipped = content[:place] + bytes([content[place] ^ 1 << trial % 8]) + content[place + 1 :]
        path.write_bytes(flipped if trial % 10 else content[:place])
        try:
            found = type(original).load(path)
        except UserError:
            continue
        assert_same(found, original)


@pytest.mark.parametrize(
    "change",
    [{"slide": None}, {"surprise": 1}, {"extent": 7}, {"kind": "tile_grid"}, {"xy": np.zeros((8, 2), np.int64)}],
    ids=str,
)
def test_a_file_of_other_contents_is_refused(tmp_path, change):
    values = {each.name: getattr(bag(), each.name) for each in fields(SlideFeatures)} | {"kind": "slide_features"}
    values = {name: value for name, value in (values | change).items() if value is not None}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    save_arrays(tmp_path / "a", arrays, {name: value for name, value in values.items() if name not in arrays})
    with pytest.raises(UserError, match="a (is no feature file of this version|holds no slide features)"):
        SlideFeatures.load(tmp_path / "a")


def test_damaged_features_are_missing_from_their_cohort_and_the_others_are_there(tmp_path):
    for slide in ("a.svs", "b.svs"):
        bag(slide).save(features_path(tmp_path, slide))
    path = features_path(tmp_path, "a.svs")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    bags, missing = load_cohort_features(tmp_path, ["a.svs", "b.svs"])
    assert [each.slide for each in bags] == ["b.svs"]
    assert "a.svs has no features" in missing[0] and "do not match their checksum" in missing[0]
