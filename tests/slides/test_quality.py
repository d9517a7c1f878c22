"""What is wrong with a drawn slide is found where it was drawn, and nowhere else."""

import cv2
import numpy as np
import pytest

from hf_pathology.slides.quality import COLOURS, find_artefacts, quality_numbers, quality_picture
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tissue import Tissue, find_tissue


MPP = (0.5, 0.5)
EXTENT = (2.0, 2.0)


def overview_of(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def clean():
    """A drawn slide of 2048 pixels, uint8 (2048, 2048, 3), and its tissue."""
    return draw_slide(7, "glandular", 2048)


def blot(size: int, xy: tuple[int, int], radius: int) -> np.ndarray:
    drawn = np.zeros((size, size), np.uint8)
    return cv2.circle(drawn, xy, radius, 1, cv2.FILLED) > 0


def test_a_slide_without_flaws_shows_none(clean):
    image, truth = clean
    numbers = quality_numbers(overview_of(image), find_artefacts(overview_of(image), EXTENT, truth, mpp=MPP))
    assert numbers.tissue_share == pytest.approx(truth.mask.mean(), abs=0.005)
    assert (numbers.pen_share, numbers.blank_share) == (0, 0)
    assert numbers.blurred_share < 0.01
    assert numbers.dark_share < 0.01
    np.testing.assert_allclose(numbers.background, np.median(image[:100, :100], axis=(0, 1)), atol=4)


def test_what_is_out_of_focus_is_found_where_it_is(clean):
    image, truth = clean[0].copy(), clean[1]
    blurred = blot(2048, (950, 1000), 250)
    image[blurred] = cv2.GaussianBlur(image, (0, 0), 12)[blurred]
    found = find_artefacts(overview_of(image), EXTENT, truth, mpp=MPP).blurred
    expected = cv2.resize(blurred.astype(np.uint8), (1024, 1024)).astype(bool)
    expected &= cv2.resize(truth.mask.astype(np.uint8), (1024, 1024)) > 0
    assert (found & expected).sum() / (found | expected).sum() > 0.7


def test_a_fold_is_dark_and_nuclei_are_not(clean):
    image, truth = clean[0].copy(), clean[1]
    fold = cv2.line(np.zeros((2048, 2048), np.uint8), (800, 700), (1000, 1200), 1, 60) > 0
    image[fold] = image[fold] // 4
    artefacts = find_artefacts(overview_of(image), EXTENT, truth, mpp=MPP)
    dark, expected = artefacts.dark, cv2.resize(fold.astype(np.uint8), (1024, 1024)) > 0
    assert (dark & expected).sum() / (dark | expected).sum() > 0.7


@pytest.mark.parametrize("pen", ["red", "green", "blue", "black"])
def test_ink_is_found_where_it_was_drawn(pen):
    image, truth = draw_slide(10, "solid", 1024, pen=pen)
    plain, _ = draw_slide(10, "solid", 1024)
    ink = overview_of((np.abs(image.astype(int) - plain).max(axis=2) > 60).astype(np.uint8)) > 0
    found = find_artefacts(overview_of(image), EXTENT, truth, mpp=MPP).pen
    assert found[ink].mean() > 0.9
    assert quality_numbers(
        overview_of(image), find_artefacts(overview_of(image), EXTENT, truth, mpp=MPP)
    ).pen_share == pytest.approx(found.mean())
    assert found.mean() < 2 * ink.mean() + 0.005


def test_what_was_not_scanned_is_blank(clean):
    image, truth = clean[0].copy(), clean[1]
    image[:256], image[-256:, :1024] = 255, 0
    assert quality_numbers(
        overview_of(image), find_artefacts(overview_of(image), EXTENT, truth, mpp=MPP)
    ).blank_share == pytest.approx(3 / 16, abs=0.01)


def test_a_slide_without_tissue_has_numbers_and_a_picture():
    image = np.full((300, 400, 3), 90, np.uint8)
    nothing = Tissue(np.zeros((30, 40), bool), (10.0, 10.0))
    numbers = quality_numbers(image, find_artefacts(image, (1.0, 1.0), nothing, mpp=MPP))
    assert (numbers.tissue_share, numbers.blurred_share, numbers.dark_share) == (0, 0, 0)
    assert numbers.background is None
    assert quality_picture(image, find_artefacts(image, (1.0, 1.0), nothing, mpp=MPP)).shape[1] == 808


def test_the_picture_shows_the_slide_beside_its_flaws_and_a_legend(clean):
    image, truth = clean[0].copy(), clean[1]
    image[:256] = 255
    overview = overview_of(image)
    picture = quality_picture(overview, find_artefacts(overview, EXTENT, truth, mpp=MPP))
    assert picture.dtype == np.uint8
    assert picture.shape[0] > 1024 and picture.shape[1:] == (2056, 3)
    np.testing.assert_array_equal(picture[500, 20], overview[500, 20])
    assert (picture[:1024, :1024] == COLOURS["tissue"]).all(axis=2).any()  # the outline
    np.testing.assert_allclose(picture[50, 1500], 0.6 * np.array(COLOURS["blank"]) + 0.4 * 255, atol=1)
    legend = picture[1024:]
    assert all((legend == colour).all(axis=2).any() for colour in COLOURS.values())


def test_numbers_of_a_real_slide_are_plausible(real_data):
    path = real_data / "wsi" / "CMU-1-Small-Region.svs"
    if not path.is_file():
        pytest.skip("needs CMU-1-Small-Region.svs")
    with Slide(path) as slide:
        overview, extent = slide.overview(1024)
        numbers = quality_numbers(overview, find_artefacts(overview, extent, find_tissue(slide), mpp=slide.mpp))
    assert 0.33 < numbers.tissue_share < 0.43
    assert numbers.pen_share == 0
    assert numbers.blurred_share < 0.01
    assert 0.01 < numbers.dark_share < 0.08  # keratin
