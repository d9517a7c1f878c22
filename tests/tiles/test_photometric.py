import colorsys
import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from hf_pathology.tiles import photometric, views
from hf_pathology.tiles.photometric import Photometric, blur, change_stains, convolve, turn_hue
from hf_pathology.tiles.views import ViewOptions, draw_colours


def plain(**changes):
    """The numbers of a view that is not changed but for `changes`."""
    colours = np.zeros(views.COLUMNS, np.float32)
    colours[[views.BRIGHTNESS, views.CONTRAST, views.SATURATION]] = 1
    colours[views.STAIN_FACTORS] = 1
    colours[views.ORDER] = [0, 1, 2, 3]
    for name, value in changes.items():
        colours[getattr(views, name)] = value
    return torch.from_numpy(colours)


def unchanged():
    """A `Photometric` that leaves pixels between 0 and 1."""
    return Photometric([0.0] * 3, [1.0] * 3)


@pytest.fixture(scope="module")
def pictures():
    """Smooth pictures of a batch of 4 tiles with one view, uint8 (4, 1, 40, 40, 3)."""
    noise = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    smooth = F.gaussian_blur(noise, [5, 5])
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1)[:, None]


def as_float(pictures):
    """The first view of each tile as torchvision takes it, float (B, 3, H, W) between 0 and 1."""
    return pictures[:, 0].permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({}, lambda x: x),
        ({"BRIGHTNESS": 1.3}, lambda x: F.adjust_brightness(x, 1.3)),
        ({"CONTRAST": 0.7}, lambda x: F.adjust_contrast(x, 0.7)),
        ({"SATURATION": 1.2}, lambda x: F.adjust_saturation(x, 1.2)),
        ({"HUE": -0.08}, lambda x: F.adjust_hue(x, -0.08)),
        ({"HUE": 0.45}, lambda x: F.adjust_hue(x, 0.45)),
        ({"GRAY": 1}, lambda x: F.rgb_to_grayscale(x, 3)),
        ({"BLUR": 0.4}, lambda x: F.gaussian_blur(x, [13, 13], [0.4, 0.4])),
        ({"BLUR": 1.1}, lambda x: F.gaussian_blur(x, [13, 13], [1.1, 1.1])),
        ({"BLUR": 2.0}, lambda x: F.gaussian_blur(x, [13, 13], [2.0, 2.0])),
        ({"SOLARIZE": 1}, lambda x: F.solarize(x, 128 / 255)),
    ],
)
def test_each_colour_change_is_torchvisions(pictures, changes, reference):
    made = unchanged()(pictures, plain(**changes).expand(4, 1, -1))
    expected = torch.stack([reference(picture) for picture in as_float(pictures)])
    torch.testing.assert_close(made[0], expected, atol=2e-3, rtol=0)  # torchvision's grey weights have four digits


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_jitter_is_torchvisions_in_each_order(pictures, order):
    amounts = {"BRIGHTNESS": 1.4, "CONTRAST": 1.3, "SATURATION": 0.6, "HUE": 0.09}
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    made = unchanged()(pictures, plain(**amounts, ORDER=order).expand(4, 1, -1))
    expected = as_float(pictures)
    for change in order:
        expected = adjust[change](expected, list(amounts.values())[change])
    torch.testing.assert_close(made[0], expected, atol=2e-3, rtol=0)


def test_each_view_of_a_batch_is_changed_by_its_own_numbers_and_comes_out_in_its_place(pictures, monkeypatch):
    monkeypatch.setattr(photometric, "CPU_PIXELS", 3 * 40 * 40)  # so that three views are changed together
    options = ViewOptions(hed=0.1)
    numbers = draw_colours(options, np.full(60, 0.5), np.full(60, 0.2), np.random.default_rng(0))
    colours = torch.from_numpy(numbers).unflatten(0, (12, 5))
    many = torch.cat([pictures, 255 - pictures, pictures.flip(2)]).repeat(1, 5, 1, 1, 1)  # (12, 5, ...)
    colour = Photometric([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    together = colour(many, colours)
    assert together.shape == (5, 12, 3, 40, 40) and together.is_contiguous()
    for tile, view in itertools.product(range(12), range(5)):
        alone = colour(many[tile : tile + 1, view : view + 1], colours[tile : tile + 1, view : view + 1])
        assert torch.equal(together[view, tile], alone[0, 0])


def test_views_are_normalised_and_left_alone_by_numbers_that_change_nothing(pictures):
    made = Photometric([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])(pictures, plain().expand(4, 1, -1))
    expected = F.normalize(as_float(pictures), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    torch.testing.assert_close(made[0], expected, atol=1e-6, rtol=1e-6)


def test_the_hue_is_turned_as_by_colorsys_for_every_kind_of_colour():
    levels = (0.0, 0.2, 0.5, 0.9, 1.0)  # among them greys, pure colours, and colours with two equal channels
    colours = list(itertools.product(levels, repeat=3))
    for turns in (-0.5, -0.3, -0.1, 0.0, 0.05, 1 / 6, 0.4, 1.0):
        made = turn_hue(torch.tensor(colours).T.reshape(1, 3, 5, 25), torch.full((1, 1, 1, 1), turns))
        turned = [((hue + turns) % 1, *rest) for hue, *rest in itertools.starmap(colorsys.rgb_to_hsv, colours)]
        expected = torch.tensor(list(itertools.starmap(colorsys.hsv_to_rgb, turned))).T.reshape(1, 3, 5, 25)
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


def test_blur_keeps_an_even_picture_and_leaves_a_view_without_blur_alone():
    even = torch.full((1, 3, 30, 30), 97.0)
    torch.testing.assert_close(blur(even.clone(), torch.tensor([2.0])), even)
    picture = torch.rand(2, 3, 20, 20)
    made = blur(picture.clone(), torch.tensor([0.0, 1.0]))
    assert torch.equal(made[0], picture[0]) and not torch.equal(made[1], picture[1])


@pytest.mark.parametrize("size", [(40, 33), (5, 9)])
def test_a_gpu_blurs_as_the_cpu_does(size):
    picture = torch.rand(5, 3, *size) * 255
    sigma = torch.tensor([0.0, 0.1, 0.6, 1.3, 2.0])
    radii = (3 * sigma).ceil().clamp(max=min(size) - 1).int()
    torch.testing.assert_close(convolve(picture, sigma, radii), blur(picture.clone(), sigma), atol=1e-3, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_changes_colours_as_the_cpu_does(pictures):
    numbers = draw_colours(ViewOptions(hed=0.1), np.full(60, 0.5), np.full(60, 0.2), np.random.default_rng(0))
    colours = torch.from_numpy(numbers).unflatten(0, (4, 15))
    many = pictures.repeat(1, 15, 1, 1, 1)
    colour = Photometric([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    on_gpu = colour.cuda()(many.cuda(), colours).cpu()
    torch.testing.assert_close(on_gpu, colour.cpu()(many, colours), atol=1e-3, rtol=0)


def stains_by_pixel(pixel, factors, shifts):
    """Tellez et al. 2018 for one pixel, 0 to 255: the stains of Ruifrok and Johnston 2001, each a unit vector."""
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    stains = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    amounts = np.linalg.solve(stains.T, -np.log(np.maximum(pixel / 255, 1 / 255)))
    return np.minimum(255 * np.exp(-(amounts * factors + shifts) @ stains), 255)


def test_stains_are_changed_as_by_the_formula_for_one_pixel():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 3, 6, 7)).astype(np.float32)
    pixels[:, :, 0, 0], pixels[:, :, 0, 1] = 0, 255
    factors, shifts = rng.uniform(0.8, 1.2, (2, 3)), rng.uniform(-0.2, 0.2, (2, 3))
    colours = torch.stack([plain(STAIN_FACTORS=factor, STAIN_SHIFTS=shift) for factor, shift in zip(factors, shifts)])
    made = change_stains(torch.from_numpy(pixels), colours).numpy()
    for view, y, x in np.ndindex(2, 6, 7):
        expected = stains_by_pixel(pixels[view, :, y, x], factors[view], shifts[view])
        np.testing.assert_allclose(made[view, :, y, x], expected, atol=0.02)


def test_more_haematoxylin_makes_a_picture_bluer_and_less_eosin_less_red():
    lilac = torch.tensor([170.0, 110.0, 180.0]).view(1, 3, 1, 1)
    more = change_stains(lilac, plain(STAIN_FACTORS=[1.3, 1, 1])[None]).flatten().tolist()
    assert more[0] < 160 and more[1] < 100 and more[2] > 165  # haematoxylin takes most from red and green
    less = change_stains(lilac, plain(STAIN_FACTORS=[1, 0.7, 1])[None]).flatten().tolist()
    assert less[1] > 120 and abs(less[0] - 170) < 5


def test_stains_that_are_not_changed_leave_every_pixel_within_one_level():
    pixels = torch.randint(0, 256, (1, 3, 50, 50), generator=torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(change_stains(pixels, plain()[None]), pixels, atol=1.0, rtol=0)
    pixels.clamp_(min=1)  # black is taken for the darkest level that lets light through
    torch.testing.assert_close(change_stains(pixels, plain()[None]), pixels, atol=1e-2, rtol=0)


def test_the_stains_are_changed_before_the_jitter(pictures):
    numbers = {"STAIN_FACTORS": [1.2, 0.9, 1.0], "STAIN_SHIFTS": [0.05, -0.05, 0.02]}
    made = unchanged()(pictures, plain(**numbers, BRIGHTNESS=1.3).expand(4, 1, -1))
    stained = change_stains(as_float(pictures) * 255, plain(**numbers).expand(4, -1)) / 255
    torch.testing.assert_close(made[0], F.adjust_brightness(stained, 1.3), atol=1e-5, rtol=0)
