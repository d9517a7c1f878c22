"""Synthetic slides: OpenSlide takes them for Aperio's, and nothing but texture tells the classes apart."""

import numpy as np
import openslide
import pytest

from hf_pathology.errors import SlideError
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cohort import read_cohort
from hf_pathology.slides.nests import LABELS, VACUOLES, place_nests
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.synthetic import BLANK, MPP, draw_slide, plan_cohort, write_demo_cohort
from hf_pathology.slides.tissue import Tissue, find_tissue, intersection_over_union


SIZE = 768
CASES_PER_CLASS = 3


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """The folder of a small cohort, and what was said of its progress."""
    said = []
    table = write_demo_cohort(
        tmp_path_factory.mktemp("demo"),
        cases_per_class=CASES_PER_CLASS,
        size=SIZE,
        workers=1,
        progress=lambda done, total: said.append((done, total)),
    )
    return table.parent, said


@pytest.fixture(scope="module")
def drawing():
    return draw_slide(7, "glandular", 1536)


def test_a_written_slide_is_aperios_to_openslide(tmp_path, drawing):
    write_aperio(tmp_path / "a.svs", drawing[0], MPP, downsamples=(1, 2, 4))
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert slide.properties[openslide.PROPERTY_NAME_VENDOR] == "aperio"
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == MPP
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_Y]) == MPP
        assert slide.properties[openslide.PROPERTY_NAME_OBJECTIVE_POWER] == "20"
        assert slide.level_dimensions == ((1536, 1536), (768, 768), (384, 384))
        assert slide.level_downsamples == (1, 2, 4)
        assert "thumbnail" in slide.associated_images


def test_the_pixels_of_a_written_slide_come_back_on_every_level(tmp_path, drawing):
    image = drawing[0]
    write_aperio(tmp_path / "a.svs", image, MPP, quality=90)
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        stored = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
        shrunk = np.asarray(slide.read_region((0, 0), 1, slide.level_dimensions[1]))[..., :3]
    assert np.abs(stored.astype(int) - image).mean() < 3
    boxes = image.reshape(384, 4, 384, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - boxes).mean() < 3


def test_levels_smaller_than_a_tile_are_left_out_and_odd_sizes_are_kept(tmp_path):
    image = np.full((300, 517, 3), 200, np.uint8)
    write_aperio(tmp_path / "a.svs", image, MPP, tile=128)
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert slide.level_dimensions == ((517, 300), (129, 75))
    write_aperio(tmp_path / "a.svs", image, MPP, downsamples=(1,))
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert slide.level_dimensions == ((517, 300),)


def test_a_slide_can_be_written_that_declares_no_resolution(tmp_path):
    write_aperio(tmp_path / "a.svs", np.full((256, 256, 3), 200, np.uint8), None)
    with Slide(tmp_path / "a.svs") as slide, pytest.raises(SlideError, match="does not declare its resolution"):
        _ = slide.mpp


def test_only_colour_images_of_bytes_are_written(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_aperio(tmp_path / "a.svs", np.zeros((256, 256, 3)), MPP)
    assert not list(tmp_path.iterdir())


def test_the_seed_decides_the_drawing():
    image, truth = draw_slide([0, 3], "solid", SIZE, pen="red")
    again, truth_again = draw_slide([0, 3], "solid", SIZE, pen="red")
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(truth.mask, truth_again.mask)
    assert (image != draw_slide([0, 4], "solid", SIZE, pen="red")[0]).any()


def test_the_size_of_a_slide_need_not_be_round():
    image, truth = draw_slide(0, "solid", 1023)
    assert image.shape == (1023, 1023, 3)
    assert truth.extent == pytest.approx((1023 / 255, 1023 / 255))


def test_a_slide_too_small_for_tissue_is_refused():
    with pytest.raises(ValueError, match="at least 512"):
        draw_slide(0, "solid", 256)


def test_classes_have_the_same_colours_and_outline(drawing):
    glandular, truth = drawing
    solid, same = draw_slide(7, "solid", 1536)
    np.testing.assert_array_equal(truth.mask, same.mask)
    mask = np.kron(truth.mask, np.ones((4, 4), bool))
    assert np.abs(glandular[mask].mean(axis=0) - solid[mask].mean(axis=0)).max() < 1
    assert np.abs(glandular[mask].std(axis=0) - solid[mask].std(axis=0)).max() < 1.5
    assert (np.abs(glandular.astype(int) - solid).max(axis=2) > 40)[mask].mean() > 0.02


def test_classes_have_as_many_nuclei_and_as_much_lumen():
    everywhere = np.ones((4000, 4000), bool)
    nests = {
        label: place_nests(np.random.default_rng(0), everywhere * np.uint8(255), everywhere, label, purity=1.0)
        for label in LABELS
    }
    for one, other in zip(*nests.values(), strict=True):
        np.testing.assert_array_equal(one.outline, other.outline)
        np.testing.assert_array_equal(one.nuclei.axes, other.nuclei.axes)
        assert len(one.nuclei.xy) == len(other.nuclei.xy)
        assert (len(one.holes), len(other.holes)) == (1, VACUOLES)
        assert sum(map(area, one.holes)) == pytest.approx(sum(map(area, other.holes)), rel=0.05)


def test_at_purity_one_half_the_classes_are_the_same_mixture():
    everywhere = np.ones((6000, 6000), bool)
    for label in LABELS:
        nests = place_nests(np.random.default_rng(1), everywhere * np.uint8(255), everywhere, label, purity=0.5)
        assert np.mean([len(nest.holes) == 1 for nest in nests]) == pytest.approx(0.5, abs=0.06)


def test_the_stain_varies_more_between_slides_than_between_classes():
    colours = []
    for seed in range(6):
        image, truth = draw_slide(seed, LABELS[seed % 2], 512)
        colours.append(image[np.kron(truth.mask, np.ones((4, 4), bool))].mean(axis=0))
    assert np.std(colours, axis=0).max() > 8


def test_the_table_is_a_cohort_of_disjoint_cases(cohort):
    folder, said = cohort
    slides, missing = read_cohort(folder / "cohort.csv", folder)
    assert missing == []
    assert len(slides) == 2 * CASES_PER_CLASS
    assert len({slide.case for slide in slides}) == len(slides)
    for split, count in (("train", 2), ("test", 1)):
        for label in LABELS:
            assert sum((slide.split, slide.label) == (split, label) for slide in slides) == count
    assert said[-1] == (2 * CASES_PER_CLASS + 1, 2 * CASES_PER_CLASS + 1)
    assert (folder / BLANK).is_file()
    assert BLANK not in {slide.key for slide in slides}


def test_tissue_of_the_cohort_is_found_as_it_was_drawn(cohort):
    folder, _ = cohort
    slides = sorted(folder.glob("*.svs"))
    assert len(slides) == 2 * CASES_PER_CLASS + 1
    for path in slides:
        truth = Tissue.load(folder / "truth" / f"{path.stem}.png")
        with Slide(path) as slide:
            assert truth.extent == pytest.approx((4, 4))
            assert intersection_over_union(find_tissue(slide), truth) >= 0.95, path.name


def test_each_class_has_every_ink_and_slides_without(cohort):
    plan = plan_cohort(20)
    for label in LABELS:
        pens = [slide.pen for slide in plan if slide.label == label]
        assert set(pens) == {None, "red", "green", "blue", "black"}
        assert pens.count(None) == 10


def test_worker_processes_write_the_same_slides(cohort, tmp_path):
    folder, _ = cohort
    write_demo_cohort(tmp_path, cases_per_class=1, size=SIZE, workers=2)
    for name in ("case_00.svs", "case_01.svs"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def area(polygon: np.ndarray) -> float:
    """The area inside the corners (P, 2), by the shoelace formula."""
    x, y = polygon.T
    return abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
