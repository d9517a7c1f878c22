"""Contours and tiles are those that CLAM's own code found, and a point lies in a polygon when OpenCV says so."""

import json
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
from originals import Case, cases
from safetensors import safe_open

from hf_pathology.errors import SlideError, UserError
from hf_pathology.slides import clam
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.clam import (
    PRESETS,
    TISSUE_METHODS,
    clam_grid_corners,
    find_contours,
    side_of_polygon,
    tissue_by,
    tissue_of_contours,
)
from hf_pathology.slides.geojson import Polygon
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tissue import Tissue, intersection_over_union


GOLDEN = "16_slide_CMU-1-Small-Region"
SLIDE_SIZE = (2220, 2967)
ORIGINALS = {
    "default": PRESETS["clam"],
    "tcga": PRESETS["clam-tcga"],
    "bwh_biopsy": PRESETS["clam-biopsy"],
    "otsu_at1": replace(PRESETS["clam-otsu"], min_area=1, min_hole=1),
}
SQUARE = Polygon(np.array([[100, 100], [100, 900], [900, 900], [900, 100]]))


def corners_as_named(contours: list[Polygon], name: str) -> np.ndarray:
    """The corners that a golden tensor called e.g. `coords_p256_s128_four_pt_hard_pad1` holds."""
    size, step, test, padding = re.fullmatch(r"coords_p(\d+)_s(\d+)_(\w+)_pad(\d)", name).groups()
    options = {"contour_test": test, "padding": padding == "1"}
    return clam_grid_corners(contours, int(size), int(step), slide_size=SLIDE_SIZE, **options)


@pytest.fixture(scope="module")
def real_slide(real_data):
    path = real_data / "wsi" / "CMU-1-Small-Region.svs"
    if not path.is_file():
        pytest.skip("needs CMU-1-Small-Region.svs")
    with Slide(path) as slide:
        yield slide


@pytest.mark.parametrize("case", cases(GOLDEN), indirect=True)
def test_the_tiles_of_a_contour_are_those_of_the_original(case: Case):
    contour = Polygon(case.output["bwh_biopsy/contour_0"].numpy())
    names = [key.split("/")[1] for key in case.output if key.startswith("bwh_biopsy/coords")]
    assert len(names) == 4
    for name in names:
        np.testing.assert_array_equal(corners_as_named([contour], name), case.output[f"bwh_biopsy/{name}"].numpy())


@pytest.mark.parametrize("preset", ORIGINALS)
def test_contours_of_a_real_slide_and_their_tiles_are_those_of_the_original(goldens, real_slide, preset):
    contours = find_contours(real_slide, ORIGINALS[preset])
    with safe_open(goldens / f"{GOLDEN}.safetensors", "np") as golden:
        said = json.loads(golden.metadata()["meta"])["segmentation"][preset]
        stored = {key.split("/")[2]: golden.get_tensor(key) for key in golden.keys() if f"/{preset}/" in key}  # noqa: SIM118
    assert [cv2.contourArea(contour.outline) for contour in contours] == said["contour_areas"]
    assert [list(cv2.boundingRect(contour.outline)) for contour in contours] == said["bounding_boxes_xywh"]
    assert [[cv2.contourArea(hole) for hole in contour.holes] for contour in contours] == said["hole_areas"]
    for name, expected in stored.items():
        found = contours[0].outline if name == "contour_0" else corners_as_named(contours, name)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("seed", range(4))
def test_a_point_lies_in_a_polygon_when_opencv_says_so(seed):
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.random((40, 40)), (0, 0), 1 + 0.5 * seed)
    for ring in cv2.findContours((noise > 0.5).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]:
        ring = ring * (seed + 1)
        points = np.concatenate([rng.integers(-8, 170 * (seed + 1), (150, 2)) / 4, ring[:, 0]])
        expected = [np.sign(cv2.pointPolygonTest(ring, point, False)) for point in points.tolist()]
        np.testing.assert_array_equal(side_of_polygon(points, ring[:, 0]), expected)
    assert side_of_polygon(np.empty((0, 2)), SQUARE.outline).shape == (0,)


def test_a_tile_is_kept_by_any_or_all_of_four_points_by_its_centre_or_by_its_corner():
    kept = {
        test: clam_grid_corners([SQUARE], 400, 300, slide_size=(2000, 2000), contour_test=test)
        for test in ("four_pt", "four_pt_hard", "center", "basic")
    }
    assert kept["basic"].tolist() == [[x, y] for x in (100, 400, 700) for y in (100, 400, 700)]  # column by column
    assert kept["four_pt"].tolist() == kept["basic"].tolist()  # 800 is inside
    assert kept["center"].tolist() == kept["basic"].tolist()  # 900 is on the edge
    assert kept["four_pt_hard"].tolist() == [[x, y] for x in (100, 400) for y in (100, 400)]
    with pytest.raises(UserError, match="all_pt.*four_pt_hard"):
        clam_grid_corners([SQUARE], 400, 300, slide_size=(2000, 2000), contour_test="all_pt")


def test_without_padding_no_tile_leaves_the_slide():
    corners = clam_grid_corners([SQUARE], 256, 128, slide_size=(1000, 700), padding=False)
    assert (corners + 256).max(axis=0).tolist() == [996, 612]
    assert len(clam_grid_corners([SQUARE], 256, 128, slide_size=(1000, 700))) > len(corners)
    assert clam_grid_corners([SQUARE], 2000, 128, slide_size=(1000, 700), padding=False).shape == (0, 2)


def test_a_tile_whose_centre_is_in_a_hole_is_left_out_and_one_on_its_edge_is_not():
    hole = np.array([[300, 300], [300, 500], [500, 500], [500, 300]])
    corners = clam_grid_corners([Polygon(SQUARE.outline, (hole,))], 200, 100, slide_size=(2000, 2000))
    assert [300, 300] not in corners.tolist()  # its centre is 400, 400
    assert [200, 200] in corners.tolist()  # its centre is 300, 300
    assert len(corners) == len(clam_grid_corners([SQUARE], 200, 100, slide_size=(2000, 2000))) - 1


def test_holes_are_kept_by_size_and_number_and_the_smallest_level_is_looked_at(tmp_path):
    image = np.full((8192, 8192, 3), (244, 243, 246), np.uint8)
    image[1024:7168, 1024:7168] = (226, 150, 188)
    for top, edge in ((1536, 1280), (3072, 1536), (5120, 768)):
        image[top : top + edge, 3072 : 3072 + edge] = (244, 243, 246)
    write_aperio(tmp_path / "slide.svs", image, 0.5, downsamples=(1, 16))
    preset = replace(PRESETS["clam-biopsy"], min_hole=3, median=1, closing=1)
    with Slide(tmp_path / "slide.svs") as slide:
        (contour,) = find_contours(slide, preset)
        (one_hole,) = find_contours(slide, replace(preset, max_holes=1))
        assert find_contours(slide, replace(preset, min_area=200)) == []
        tissue = tissue_of_contours([contour], slide.dimensions)
    assert contour.outline.dtype == np.int32
    assert contour.outline.min(axis=0).tolist() == pytest.approx([1024, 1024], abs=16)
    tops = [hole[:, 1].min() for hole in contour.holes]
    assert tops == pytest.approx([3072, 1536], abs=17)  # the largest first; the third, of 2.25 squares, is tissue
    assert len(one_hole.holes) == 1
    drawn = np.zeros((512, 512), bool)
    drawn[64:448, 64:448] = True
    drawn[96:176, 192:272] = drawn[192:288, 192:288] = False
    assert intersection_over_union(tissue, Tissue(drawn, (16.0, 16.0))) > 0.98


def test_every_method_finds_the_tissue_that_was_drawn(tmp_path):
    image, truth = draw_slide(2, "solid", 1024)
    small = {  # a drawn slide is smaller than the pieces that most presets drop
        name: replace(preset, min_area=0, min_hole=0) for name, preset in PRESETS.items()
    }
    write_aperio(tmp_path / "slide.svs", image, 0.5, downsamples=(1,))
    with Slide(tmp_path / "slide.svs") as slide:
        assert intersection_over_union(tissue_by(slide, "default"), truth) > 0.95
        for name, preset in small.items():
            found = tissue_of_contours(find_contours(slide, preset), slide.dimensions)
            assert intersection_over_union(found, truth) > 0.8, name
        for name in PRESETS:
            assert tissue_by(slide, name).mask.shape == (1024, 1024)
        with pytest.raises(UserError, match=f"magic.*{', '.join(TISSUE_METHODS)}"):
            tissue_by(slide, "magic")


def test_a_slide_without_a_small_level_is_refused_by_name(ramp_slide, monkeypatch):
    monkeypatch.setattr(clam, "MAX_PIXELS", 10_000)
    with Slide(ramp_slide) as slide, pytest.raises(SlideError, match=r"ramp\.svs.*512x384"):
        find_contours(slide, PRESETS["clam"])
