"""Tissue is found by colour on stains of every strength, and glass and ink are not tissue."""

import time

import cv2
import numpy as np
import pytest

from hf_pathology.errors import UserError
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tissue import (
    Tissue,
    fill_small_holes,
    find_pen,
    find_tissue,
    intersection_over_union,
    remove_small_pieces,
)


SIZE = 1024
MPP = 0.5
GLASS, PINK, VIOLET = (244, 243, 246), (226, 150, 188), (110, 70, 150)


def disc(radius: int, colour: tuple[int, int, int]) -> np.ndarray:
    """A disc in the middle of glass, uint8 (SIZE, SIZE, 3)."""
    image = np.full((SIZE, SIZE, 3), GLASS, np.uint8)
    cv2.circle(image, (SIZE // 2, SIZE // 2), radius, colour, cv2.FILLED)
    return image


def found_in(folder, image: np.ndarray, mpp: float | None = MPP, **options) -> Tissue:
    write_aperio(folder / "slide.svs", image, mpp, downsamples=(1,))
    with Slide(folder / "slide.svs") as slide:
        return find_tissue(slide, **options)


@pytest.mark.parametrize(("seed", "label"), [(1, "glandular"), (2, "solid"), (3, "glandular"), (5, "solid")])
def test_tissue_is_found_whatever_the_stain_and_the_class(tmp_path, seed, label):
    image, truth = draw_slide(seed, label, SIZE)
    assert intersection_over_union(found_in(tmp_path, image), truth) >= 0.95


@pytest.mark.parametrize(("seed", "pen"), [(10, "red"), (11, "green"), (12, "blue"), (13, "black")])
def test_ink_of_every_colour_is_not_tissue(tmp_path, seed, pen):
    clean, tissue_and_ink = draw_slide(seed, "solid", SIZE)
    image, truth = draw_slide(seed, "solid", SIZE, pen=pen)
    found = found_in(tmp_path, image)
    assert intersection_over_union(found, truth) >= 0.95
    ink = np.abs(image.astype(int) - clean).max(axis=2) > 60
    assert ink.mean() > 0.005
    assert found.mask[ink].mean() < 0.02
    assert not find_pen(cv2.medianBlur(clean, 5), MPP).any()
    assert (tissue_and_ink.mask & ~truth.mask).any()


def test_a_blank_slide_has_no_tissue(tmp_path):
    image, truth = draw_slide(0, None, SIZE)
    assert not truth.mask.any()
    assert not found_in(tmp_path, image).mask.any()


@pytest.mark.parametrize("grey", [0, 120, 200, 255])
def test_a_uniform_slide_has_no_tissue(tmp_path, grey):
    assert not found_in(tmp_path, np.full((SIZE, SIZE, 3), grey, np.uint8)).mask.any()


@pytest.mark.parametrize("mpp", [MPP, 4.0])
@pytest.mark.parametrize(
    "glass", [(255, 255, 255), (200, 200, 200), (240, 235, 215), (245, 235, 240), (225, 232, 240)]
)
def test_glass_of_any_tint_with_noise_shade_and_dust_has_no_tissue(tmp_path, glass, mpp):
    rng = np.random.default_rng(0)
    shade = np.linspace(-8, 8, SIZE)[:, None, None]
    image = np.clip(glass + shade + rng.normal(0, 4, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    for x, y, radius, grey in rng.integers((0, 0, 2, 60), (SIZE, SIZE, 10, 160), (40, 4)).tolist():
        cv2.circle(image, (x, y), radius, (grey, grey, grey), cv2.FILLED)
    assert not found_in(tmp_path, image, mpp).mask.any()


@pytest.mark.parametrize("max_edge", [1536, 512, 192])  # 0.5, 1.5 and 4 um per pixel
@pytest.mark.parametrize("diameter", [120, 190])  # 60 and 95 um
def test_fat_is_tissue_though_nearly_all_of_it_is_lumen(tmp_path, diameter, max_edge):
    image = np.full((1536, 1536, 3), GLASS, np.uint8)
    cv2.circle(image, (768, 768), 650, PINK, cv2.FILLED)
    truth = image[..., 1] == PINK[1]
    for row, y in enumerate(range(0, 1536, int(0.87 * diameter))):  # honeycomb, with walls of 2 um
        for x in range(row % 2 * diameter // 2, 1536, diameter):
            if np.hypot(x - 768, y - 768) < 650 - 0.6 * diameter:
                cv2.circle(image, (x, y), diameter // 2 - 2, GLASS, cv2.FILLED)
    found = found_in(tmp_path, image, max_edge=max_edge)
    assert intersection_over_union(found, Tissue(truth, (1.0, 1.0))) > 0.97


def test_an_overview_of_2048_pixels_is_judged_in_a_fraction_of_a_second():
    image, _ = draw_slide(2, "solid", 2048, pen="red")

    class Drawn:
        mpp = (MPP, MPP)

        def overview(self, max_edge: int) -> tuple[np.ndarray, tuple[float, float]]:
            return image, (1.0, 1.0)

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        seconds = []
        for _ in range(3):
            start = time.process_time()
            find_tissue(Drawn())
            seconds.append(time.process_time() - start)
    finally:
        cv2.setNumThreads(threads)
    assert min(seconds) < 0.5  # 0.2 on a quiet core; this is for the day when somebody makes it slow


def test_a_slide_full_of_tissue_is_all_tissue(tmp_path):
    image = np.full((SIZE, SIZE, 3), PINK, np.uint8)
    image[:, : SIZE // 2] = VIOLET
    assert found_in(tmp_path, image).mask.all()


def test_pale_and_dark_tissue_are_both_found(tmp_path):
    image = disc(200, VIOLET)
    cv2.circle(image, (160, 160), 120, (238, 205, 222), cv2.FILLED)
    assert found_in(tmp_path, image).mask[[160, SIZE // 2], [160, SIZE // 2]].all()


def test_lumens_are_tissue_and_large_holes_are_not(tmp_path):
    image = disc(450, PINK)
    cv2.circle(image, (400, 512), 80, GLASS, cv2.FILLED)  # 80 um across
    cv2.circle(image, (700, 512), 160, GLASS, cv2.FILLED)  # 160 um across
    mask = found_in(tmp_path, image).mask
    assert mask[512, 400]
    assert not mask[512, 700]


@pytest.mark.parametrize("mpp", [MPP, None])
def test_specks_are_dropped_even_without_a_declared_resolution(tmp_path, mpp):
    image = disc(300, PINK)
    cv2.circle(image, (80, 80), 40, PINK, cv2.FILLED)  # 40 um across
    mask = found_in(tmp_path, image, mpp).mask
    assert mask[512, 512]
    assert not mask[80, 80]


def test_the_mask_lies_on_level_0_whatever_its_size(tmp_path):
    image = disc(300, PINK)
    found = found_in(tmp_path, image, max_edge=300)
    assert found.mask.shape == (300, 300)
    assert found.extent == pytest.approx((SIZE / 300, SIZE / 300))
    y, x = np.argwhere(found.mask).mean(axis=0) + 0.5
    assert (x * found.extent[0], y * found.extent[1]) == pytest.approx((512, 512), abs=2)
    assert found.mask.sum() * found.extent[0] * found.extent[1] == pytest.approx(np.pi * 300**2, rel=0.03)


def test_a_saved_mask_is_loaded_as_it_was(tmp_path):
    tissue = Tissue(np.random.default_rng(0).random((30, 41)) < 0.5, (2.963951935914553, 2.967))
    tissue.save(tmp_path / "masks" / "a.png")
    loaded = Tissue.load(tmp_path / "masks" / "a.png")
    assert loaded.mask.dtype == bool
    np.testing.assert_array_equal(loaded.mask, tissue.mask)
    assert loaded.extent == tissue.extent
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["a.png"]


def test_a_file_that_is_no_mask_is_refused_by_name(tmp_path):
    cv2.imwrite(str(tmp_path / "no_extent.png"), np.zeros((4, 4), np.uint8))
    (tmp_path / "torn.png").write_bytes((tmp_path / "no_extent.png").read_bytes()[:40])
    for name in ("no_extent.png", "torn.png", "absent.png"):
        with pytest.raises(UserError, match=name):
            Tissue.load(tmp_path / name)


def test_small_pieces_and_holes_are_told_from_large_ones_by_area():
    mask = np.zeros((20, 20), bool)
    mask[2:12, 2:12] = True
    mask[15:17, 15:17] = True
    mask[4:6, 4:6] = False
    assert remove_small_pieces(mask, 5).sum() == 96
    assert fill_small_holes(mask, 5).sum() == 104
    assert fill_small_holes(mask, 4).sum() == 100
    assert not fill_small_holes(~np.ones((5, 5), bool), 100).any()


def test_tissue_of_a_real_slide_covers_a_plausible_share(real_data):
    path = real_data / "wsi" / "CMU-1-Small-Region.svs"
    if not path.is_file():
        pytest.skip("needs CMU-1-Small-Region.svs")
    with Slide(path) as slide:
        found = find_tissue(slide, max_edge=1024)
    assert 0.33 < found.mask.mean() < 0.43
    height, width = found.mask.shape
    assert found.mask[int(0.7 * height), int(0.4 * width)]
    assert not found.mask[:, : width // 5][: height // 4].any()
