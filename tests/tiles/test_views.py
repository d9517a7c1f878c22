import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from hf_pathology.tiles import views
from hf_pathology.tiles.photometric import Photometric, blur, turn_hue
from hf_pathology.tiles.views import MultiCrop, ViewOptions, draw_colours, draw_crop


OPTIONS = ViewOptions(global_size=64, local_size=32, local_views=3)


def row(seed=0, **changes):
    tile = np.random.default_rng(seed).integers(0, 255, (96, 96, 3)).astype(np.uint8)
    return {"tile": tile, "slide": "a.svs", "xy": np.array([10, 20]), "epoch": 0, **changes}


def test_views_have_the_announced_shapes():
    made = MultiCrop(OPTIONS, patch_size=8, seed=0)(row())
    assert {name: (value.shape, value.dtype.name) for name, value in made.items()} == {
        "global_views": ((2, 64, 64, 3), "uint8"),
        "global_colours": ((2, views.COLUMNS), "float32"),
        "local_views": ((3, 32, 32, 3), "uint8"),
        "local_colours": ((3, views.COLUMNS), "float32"),
        "hidden": ((2, 8, 8), "bool"),
    }


@pytest.mark.parametrize("change", [{"epoch": 1}, {"slide": "b.svs"}, {"xy": np.array([10, 21])}])
def test_views_depend_on_run_epoch_slide_and_corner_and_on_nothing_else(change):
    make = MultiCrop(OPTIONS, patch_size=8, seed=0)
    first, again, other = make(row()), make(row()), make(row(**change))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["global_views"], other["global_views"])
    assert not np.array_equal(first["global_views"], MultiCrop(OPTIONS, 8, seed=1)(row())["global_views"])


def test_a_whole_tile_without_changes_comes_through_unchanged():
    options = ViewOptions(global_size=96, local_views=0, global_scale=[1.0, 1.0])
    tile = row()["tile"]
    made = [MultiCrop(options, 8, seed)(row())["global_views"] for seed in range(12)]
    squares = [view for pair in made for view in pair]
    # with scale 1 a box fits only when it is nearly square; those that do are the tile or its mirror image
    whole = [view for view in squares if np.array_equal(view, tile) or np.array_equal(view, tile[:, ::-1])]
    assert len(whole) >= 12


def test_boxes_lie_inside_and_have_the_asked_areas():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_crop(100, 120, (0.2, 0.6), rng) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 100).all() and (left + width <= 120).all()
    area = height * width / 12_000
    assert 0.18 < area.min() < 0.24 and 0.55 < area.max() < 0.62
    assert 0.38 < area.mean() < 0.42


def test_colour_changes_have_the_published_rates():
    drawn = np.stack([draw_colours(np.random.default_rng(i), blur=0.5, solarize=0.2) for i in range(4000)])
    rates = (
        (drawn[:, [views.BRIGHTNESS]] != 1).mean(),
        *(drawn[:, [views.GRAY, views.BLUR, views.SOLARIZE]] > 0).mean(0),
    )
    assert rates == pytest.approx((0.8, 0.2, 0.5, 0.2), abs=0.03)
    assert drawn[:, views.BRIGHTNESS].min() >= 0.6 and drawn[:, views.HUE].max() <= 0.1
    assert (np.sort(drawn[:, views.ORDER]) == np.arange(4)).all()


def test_colour_changes_can_be_made_weaker_or_left_out():
    options = ViewOptions(
        global_size=64, local_size=32, jitter=[0.2, 0.0, 0.1, 0.5], gray=0.0, blur=[0.0, 0.0, 1.0], solarize=0.0
    )
    made = [MultiCrop(options, 8, seed)(row()) for seed in range(100)]
    drawn = np.concatenate([views_of_tile["global_colours"] for views_of_tile in made])
    assert 0.8 <= drawn[:, views.BRIGHTNESS].min() < 0.83 and 1.17 < drawn[:, views.BRIGHTNESS].max() <= 1.2
    assert 0.4 < np.abs(drawn[:, views.HUE]).max() <= 0.5
    assert (drawn[:, views.CONTRAST] == 1).all()
    assert (drawn[:, [views.GRAY, views.BLUR, views.SOLARIZE]] == 0).all()
    assert all((views_of_tile["local_colours"][:, views.BLUR] > 0).all() for views_of_tile in made)


def plain(**changes):
    """The numbers of a view that is not changed but for `changes`."""
    colours = np.zeros(views.COLUMNS, np.float32)
    colours[[views.BRIGHTNESS, views.CONTRAST, views.SATURATION]] = 1
    colours[views.ORDER] = [0, 1, 2, 3]
    for name, value in changes.items():
        colours[getattr(views, name)] = value
    return torch.from_numpy(colours)


@pytest.fixture(scope="module")
def pictures():
    """Smooth pictures of a batch of 4 tiles with one view, uint8 (4, 1, 40, 40, 3)."""
    noise = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    smooth = F.gaussian_blur(noise, [5, 5])
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1)[:, None]


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({}, lambda x: x),
        ({"BRIGHTNESS": 1.3}, lambda x: F.adjust_brightness(x, 1.3)),
        ({"CONTRAST": 0.7}, lambda x: F.adjust_contrast(x, 0.7)),
        ({"SATURATION": 1.2}, lambda x: F.adjust_saturation(x, 1.2)),
        ({"HUE": -0.08}, lambda x: F.adjust_hue(x, -0.08)),
        ({"GRAY": 1}, lambda x: F.rgb_to_grayscale(x, 3)),
        ({"BLUR": 1.1}, lambda x: F.gaussian_blur(x, [13, 13], [1.1, 1.1])),
        ({"SOLARIZE": 1}, lambda x: F.solarize(x, 128 / 255)),
        (
            {"HUE": 0.05, "CONTRAST": 1.3, "ORDER": [3, 1, 0, 2]},
            lambda x: F.adjust_contrast(F.adjust_hue(x, 0.05), 1.3),
        ),
    ],
)
def test_each_colour_change_is_torchvisions(pictures, changes, reference):
    made = Photometric([0.0] * 3, [1.0] * 3)(pictures, plain(**changes).expand(4, 1, -1))
    expected = torch.stack([reference(picture[0].permute(2, 0, 1).float() / 255) for picture in pictures])
    torch.testing.assert_close(made[0], expected, atol=2e-3, rtol=0)  # torchvision's grey weights have four digits


def test_each_view_of_a_batch_is_changed_by_its_own_numbers(pictures):
    colours = torch.stack([plain(), plain(BRIGHTNESS=0.7), plain(BLUR=1.5), plain(HUE=0.1, GRAY=1)])[:, None]
    colour = Photometric([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    together = colour(pictures, colours)
    alone = torch.cat([colour(pictures[i : i + 1], colours[i : i + 1]) for i in range(4)], dim=1)
    assert torch.equal(together, alone)


def test_views_come_out_view_first(pictures):
    both = torch.cat([pictures, 255 - pictures], dim=1)  # (4, 2, ...)
    made = Photometric([0.0] * 3, [1.0] * 3)(both, plain().expand(4, 2, -1))
    assert made.shape == (2, 4, 3, 40, 40)
    torch.testing.assert_close(made[0] + made[1], torch.ones_like(made[0]))


def test_blur_keeps_the_mean_of_an_even_picture_and_a_full_turn_of_hue_changes_nothing():
    even = torch.full((1, 3, 30, 30), 0.37)
    torch.testing.assert_close(blur(even, torch.full((1, 1, 1, 1), 2.0)), even)
    picture = torch.rand(2, 3, 20, 20)
    torch.testing.assert_close(turn_hue(picture, torch.ones(2, 1, 1, 1)), picture, atol=1e-5, rtol=0)
