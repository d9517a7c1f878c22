import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from hf_pathology.errors import UserError
from hf_pathology.tiles import views
from hf_pathology.tiles.hidden import HiddenOptions, HiddenPatches
from hf_pathology.tiles.views import MultiCrop, ViewOptions, draw_boxes, resized


OPTIONS = ViewOptions(global_size=64, local_size=32, local_views=3)


def row(seed=0, **changes):
    tile = np.random.default_rng(seed).integers(0, 255, (96, 96, 3)).astype(np.uint8)
    return {"tile": tile, "slide": "a.svs", "xy": np.array([10, 20]), "epoch": 0, **changes}


def slopes(size=240):
    """A tile of which red tells the place from left to right, green from top to bottom, both in pixels."""
    place = np.arange(size, dtype=np.uint8)
    return np.stack(np.broadcast_arrays(place[None, :], place[:, None], np.uint8(0)), axis=2)


def test_views_have_the_announced_shapes():
    made = MultiCrop(OPTIONS, 0, HiddenPatches(HiddenOptions(), 8, 7))(row())
    assert {name: (value.shape, value.dtype.name) for name, value in made.items()} == {
        "global_views": ((2, 64, 64, 3), "uint8"),
        "global_colours": ((2, views.COLUMNS), "float32"),
        "local_views": ((3, 32, 32, 3), "uint8"),
        "local_colours": ((3, views.COLUMNS), "float32"),
        "hidden": ((2, 8, 7), "bool"),
    }
    assert all(value.flags["C_CONTIGUOUS"] for name, value in made.items() if name.endswith("views"))


def test_one_global_view_and_nothing_else_is_made_for_mae():
    made = MultiCrop(ViewOptions(global_size=64, global_views=1, local_views=0), 0)(row())
    assert {name: len(value) for name, value in made.items()} == {"global_views": 1, "global_colours": 1}


@pytest.mark.parametrize("change", [{"epoch": 1}, {"slide": "b.svs"}, {"xy": np.array([10, 21])}])
def test_views_depend_on_run_epoch_slide_and_corner_and_on_nothing_else(change):
    hidden = HiddenPatches(HiddenOptions([0.3], [0.2]), 8, 8)
    make = MultiCrop(OPTIONS, 0, hidden)
    first, again, other, other_run = (
        make(row()),
        make(row()),
        make(row(**change)),
        MultiCrop(OPTIONS, 1, hidden)(row()),
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    assert not any(np.array_equal(first[name], other_run[name]) for name in first)


def test_tiles_that_must_not_be_written_to_are_served_and_left_alone():
    options = ViewOptions(global_size=96, local_size=32, quarter_turns=True, vertical_flip=True)
    tile = row()["tile"]
    tile.setflags(write=False)
    for seed in range(20):
        MultiCrop(options, seed)(row(tile=tile))
    assert np.array_equal(tile, row()["tile"])


def test_a_whole_tile_without_changes_comes_through_unchanged():
    options = ViewOptions(global_size=96, local_views=0, global_scale=[1.0, 1.0], ratio=[1.0, 1.0])
    tile = row()["tile"]
    made = np.concatenate([MultiCrop(options, seed)(row())["global_views"] for seed in range(12)])
    mirrored = [np.array_equal(view, tile[:, ::-1]) for view in made]
    assert all(same != np.array_equal(view, tile) for same, view in zip(mirrored, made))
    assert 4 < sum(mirrored) < 20


@pytest.mark.parametrize(("high", "wide", "size"), [(214, 190, 224), (121, 140, 96), (50, 80, 96), (200, 100, 48)])
def test_a_crop_is_resized_as_by_torchvision_with_antialiasing(high, wide, size):
    tile = np.random.default_rng(0).integers(0, 255, (256, 256, 3)).astype(np.uint8)
    whole = torch.from_numpy(tile).permute(2, 0, 1)
    expected = F.resized_crop(whole, 7, 20, high, wide, [size, size], v2.InterpolationMode.BICUBIC, antialias=True)
    made = resized(tile[7 : 7 + high, 20 : 20 + wide], size)
    assert np.array_equal(made, expected.permute(1, 2, 0).numpy())
    assert made.flags["C_CONTIGUOUS"]


def test_boxes_are_distributed_as_those_of_torchvision():
    scale, ratio, count = (0.2, 0.9), (3 / 4, 4 / 3), 4000
    areas = np.tile(np.array(scale) * 100 * 120, (count, 1))
    ours = draw_boxes(100, 120, areas, ratio, np.random.default_rng(0))
    torch.manual_seed(0)
    draw = v2.RandomResizedCrop(10, scale, ratio)
    drawn = [draw.make_params([torch.empty(3, 100, 120)]) for _ in range(count)]
    theirs = np.array([[box[name] for name in ("top", "left", "height", "width")] for box in drawn])
    top, left, height, width = ours.T
    assert (ours >= 0).all() and (top + height <= 100).all() and (left + width <= 120).all()
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=4 * theirs.std(0).max() * math.sqrt(2 / count))
    levels = [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98]
    for of_box in (lambda box: box[2] * box[3] / 12_000, lambda box: box[3] / box[2]):
        np.testing.assert_allclose(
            np.quantile(of_box(ours.T), levels), np.quantile(of_box(theirs.T), levels), atol=0.04
        )


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (100, 110)])
def test_when_no_box_fits_the_largest_in_the_middle_is_taken_as_by_torchvision(height, width):
    ours = draw_boxes(height, width, np.array([[1e6, 1e6]]), (3 / 4, 4 / 3), np.random.default_rng(0))[0]
    theirs = v2.RandomResizedCrop(10, (100.0, 100.0)).make_params([torch.empty(3, height, width)])
    assert ours.tolist() == [theirs[name] for name in ("top", "left", "height", "width")]


def shown(view):
    """Width and height, in pixels of the tile, that a view of `slopes` shows; negative where it is turned around."""
    red, green = view[..., 0].astype(float), view[..., 1].astype(float)
    inner = slice(3, -3)  # at the edges the interpolation flattens the slopes
    across, down = np.diff(red[:, inner], axis=1).mean(), np.diff(green[inner], axis=0).mean()
    return across * view.shape[1], down * view.shape[0]


def test_native_crops_keep_the_magnification_of_the_tile():
    options = ViewOptions(
        global_size=160,
        local_size=64,
        native_crops=True,
        global_scale=[0.9, 1.1],
        local_scale=[0.9, 1.1],
        ratio=[0.95, 1.05],
        local_views=4,
    )
    made = [MultiCrop(options, seed)(row(tile=slopes())) for seed in range(60)]
    for name, size in (("global_views", 160), ("local_views", 64)):
        found = np.abs([shown(view) for views_of_tile in made for view in views_of_tile[name]]) / size
        width, height = found.T
        slack = 1.5 / size  # boxes are whole pixels
        assert (found > math.sqrt(0.9 * 0.95) - slack).all() and (found < math.sqrt(1.1 * 1.05) + slack).all()
        assert 0.9 - 2 * slack < (width * height).min() < 0.92 and 1.08 < (width * height).max() < 1.1 + 2 * slack
        assert 0.95 - 2 * slack < (width / height).min() < 0.97 and 1.03 < (width / height).max() < 1.05 + 2 * slack


def test_native_crops_of_too_small_a_tile_are_refused_with_the_size_that_would_do():
    native = {"native_crops": True, "global_scale": [0.9, 1.1], "local_scale": [0.9, 1.1], "ratio": [0.95, 1.05]}
    options = ViewOptions(global_size=90, local_size=32, **native)
    options.check_tile_size(97)
    for refused in (lambda: options.check_tile_size(96), lambda: MultiCrop(options, 0)(row())):
        with pytest.raises(UserError, match="tile_size is 96: choose a tile_size of at least 97"):
            refused()
    for seed in range(200):
        assert MultiCrop(options, seed)(row(tile=slopes(97)))["global_views"].shape == (2, 90, 90, 3)


@pytest.mark.parametrize(
    ("turns", "orientations"),
    [
        ({}, 2),
        ({"vertical_flip": True}, 4),
        ({"quarter_turns": True}, 8),
        ({"vertical_flip": True, "quarter_turns": True}, 8),
    ],
)
def test_views_are_mirrored_and_turned_to_each_side_equally_often(turns, orientations):
    options = ViewOptions(global_size=32, local_size=32, local_views=8, **turns)
    made = [MultiCrop(options, seed)(row(tile=slopes())) for seed in range(200)]
    seen = {}
    for view in np.concatenate([views_of_tile["local_views"] for views_of_tile in made]).astype(float):
        red, green = view[..., 0], view[..., 1]
        across = red[:, 16:].mean() - red[:, :16].mean(), green[:, 16:].mean() - green[:, :16].mean()
        down = red[16:].mean() - red[:16].mean(), green[16:].mean() - green[:16].mean()
        way = tuple(np.sign(np.round([*across, *down])).astype(int))
        seen[way] = seen.get(way, 0) + 1
    assert (1, 0, 0, 1) in seen and (-1, 0, 0, 1) in seen
    assert len(seen) == orientations
    assert np.array(list(seen.values())) / 1600 == pytest.approx(1 / orientations, abs=0.04)


def colours(options, name, count=1500):
    return np.stack([MultiCrop(options, seed)(row())[f"{name}_colours"] for seed in range(count)])


def test_colour_changes_of_each_kind_of_view_have_the_published_rates():
    options = ViewOptions(global_size=16, local_size=16, local_views=2, global_views=3)
    first, second, third = colours(options, "global").transpose(1, 0, 2)
    local = colours(options, "local").reshape(-1, views.COLUMNS)
    for drawn, blurred, solarized in ((first, 1.0, 0.0), (second, 0.1, 0.2), (third, 0.1, 0.0), (local, 0.5, 0.0)):
        rates = (drawn[:, views.BRIGHTNESS] != 1).mean(), (drawn[:, views.GRAY] > 0).mean()
        assert rates == pytest.approx((0.8, 0.2), abs=0.04)
        assert (drawn[:, views.BLUR] > 0).mean() == pytest.approx(blurred, abs=0.04 * (blurred < 1))
        assert (drawn[:, views.SOLARIZE] > 0).mean() == pytest.approx(solarized, abs=0.04 * (solarized > 0))
        assert (np.sort(drawn[:, views.ORDER]) == np.arange(4)).all()
        for change, least, most in ((0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.8, 1.2), (3, -0.1, 0.1)):
            amounts = drawn[:, change]
            assert least - 1e-6 <= amounts.min() < least + 0.01 and most - 0.01 < amounts.max() <= most + 1e-6
    sigma = first[:, views.BLUR]
    assert 0.1 <= sigma.min() < 0.12 and 1.98 < sigma.max() <= 2 and sigma.mean() == pytest.approx(1.05, abs=0.05)
    places = (local[:, views.ORDER] == views.HUE).mean(0)
    assert places == pytest.approx(0.25, abs=0.04)


def test_colour_changes_can_be_made_weaker_or_left_out():
    options = ViewOptions(
        global_size=16,
        local_size=16,
        jitter=[1.5, 0.0, 0.1, 0.5],
        jitter_probability=1.0,
        gray=0.0,
        blur=[0.0, 0.0, 1.0],
        blur_sigma=[0.5, 0.7],
        solarize=0.0,
    )
    drawn = colours(options, "global", 300).reshape(-1, views.COLUMNS)
    assert 0 <= drawn[:, views.BRIGHTNESS].min() < 0.03 and 2.4 < drawn[:, views.BRIGHTNESS].max() <= 2.5
    assert (drawn[:, views.BRIGHTNESS] != 1).all() and (drawn[:, views.CONTRAST] == 1).all()
    assert 0.48 < np.abs(drawn[:, views.HUE]).max() <= 0.5
    assert (drawn[:, [views.GRAY, views.BLUR, views.SOLARIZE]] == 0).all()
    sigma = colours(options, "local", 300)[..., views.BLUR]
    assert 0.5 <= sigma.min() < 0.51 and 0.69 < sigma.max() <= np.float32(0.7)
    still = ViewOptions(global_size=16, local_size=16, jitter_probability=0.0)
    assert (colours(still, "local", 20)[..., :4] == [1, 1, 1, 0]).all()


def test_stains_are_changed_only_when_asked_for_and_then_each_by_its_own_numbers():
    plain = colours(ViewOptions(global_size=16, local_size=16), "local", 50)
    assert (plain[..., views.STAIN_FACTORS] == 1).all() and (plain[..., views.STAIN_SHIFTS] == 0).all()
    options = ViewOptions(global_size=16, local_size=16, hed=0.05, hed_probability=0.3)
    drawn = colours(options, "local", 500).reshape(-1, views.COLUMNS)
    factors, shifts = drawn[:, views.STAIN_FACTORS], drawn[:, views.STAIN_SHIFTS]
    changed = (factors != 1).any(1)
    assert changed.mean() == pytest.approx(0.3, abs=0.03)
    assert (shifts[~changed] == 0).all()
    numbers = np.concatenate([factors[changed] - 1, shifts[changed]], axis=1)
    assert np.abs(numbers).max() <= 0.05 + 1e-6 and np.abs(numbers.mean(0)).max() < 0.004
    np.testing.assert_allclose(np.cov(numbers.T), np.eye(6) * 0.05**2 / 3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"global_size": 0}, "global_size is 0: it must be at least 1"),
        ({"local_size": 0}, "local_size is 0"),
        ({"global_views": 0}, "global_views is 0: it must be at least 1"),
        ({"local_views": -1}, "local_views is -1"),
        ({"global_scale": [1.0, 0.25]}, r"global_scale is \[1.0, 0.25\]: .* the smaller first"),
        ({"global_scale": [0.25, 1.1]}, "global_scale is .* from 0.001 to 1.0"),
        ({"local_scale": [0.05]}, "local_scale is .* 2 numbers"),
        ({"native_crops": True}, "global_scale is .* from 0.5 to 2.0"),
        ({"ratio": [0.0, 1.0]}, "ratio is"),
        ({"jitter": [0.4, 0.4, 0.2]}, "jitter is .* 4 numbers"),
        ({"jitter": [0.4, 0.4, -0.2, 0.1]}, "jitter is"),
        ({"jitter": [0.4, 0.4, 0.2, 0.6]}, "jitter is .* a turn of the hue, must be at most 0.5"),
        ({"jitter": [0.4, 0.4, 0.2, "low"]}, "jitter is"),
        ({"jitter_probability": 1.5}, "jitter_probability is 1.5: it must be between 0 and 1"),
        ({"gray": -0.1}, "gray is -0.1"),
        ({"blur": [1.0, 0.1]}, "blur is .* 3 numbers"),
        ({"blur": [1.0, 0.1, 2.0]}, "blur is"),
        ({"blur_sigma": [2.0, 0.1]}, "blur_sigma is"),
        ({"solarize": math.nan}, "solarize is nan"),
        ({"hed": -0.05}, "hed is -0.05"),
        ({"hed_probability": 2}, "hed_probability is 2"),
        ({"mean": [0.5, 0.5]}, "mean is"),
        ({"std": [0.2, 0.0, 0.2]}, "std is"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, said):
    with pytest.raises(UserError, match=said):
        ViewOptions(**options)
