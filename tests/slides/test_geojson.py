"""A mask comes back from GeoJSON as it was, what QuPath writes is read, and what makes no sense is refused by name."""

import json

import numpy as np
import pytest

from hf_pathology.errors import UserError
from hf_pathology.slides.geojson import (
    UNCLASSIFIED,
    Polygon,
    class_fractions,
    draw_polygons,
    polygons_of,
    read_annotations,
    read_geojson,
    write_geojson,
)
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tissue import Tissue, intersection_over_union


SLIDE_SIZE = (1000, 800)


def square(left: float, top: float, edge: float) -> list[list[float]]:
    right, bottom = left + edge, top + edge
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def feature(kind: str, coordinates: list, **properties) -> dict:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def written(folder, content):
    path = folder / "slide.geojson"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def area(tissue: Tissue) -> float:
    """In level-0 pixels."""
    return tissue.mask.sum() * tissue.extent[0] * tissue.extent[1]


def test_a_mask_comes_back_as_it_was_with_holes_pieces_single_pixels_and_borders(tmp_path):
    mask = np.zeros((64, 80), bool)
    mask[10:40, 10:40] = True
    mask[15:25, 15:25] = False  # a hole
    mask[18:22, 18:22] = True  # a piece in it
    mask[30, 30] = False
    mask[50, 60] = True  # one pixel
    mask[51, 61] = True  # that touches another at its corner
    mask[:5, 70:] = True  # in the slide's corner
    mask[63, :] = True  # along its edge
    tissue = Tissue(mask, (12.5, 12.5))
    write_geojson(tmp_path / "a.geojson", tissue)
    loaded = read_geojson(tmp_path / "a.geojson", SLIDE_SIZE, max_edge=80)
    assert loaded.extent == pytest.approx(tissue.extent)
    np.testing.assert_array_equal(loaded.mask, mask)
    assert [path.name for path in tmp_path.iterdir()] == ["a.geojson"]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_any_mask_comes_back_as_it_was(tmp_path, share):
    mask = np.random.default_rng(0).random((97, 131)) < share
    write_geojson(tmp_path / "a.geojson", Tissue(mask, (27.342, 27.339)))
    loaded = read_geojson(tmp_path / "a.geojson", (round(131 * 27.342), round(97 * 27.339)), max_edge=131)
    np.testing.assert_array_equal(loaded.mask, mask)


def test_a_mask_of_another_size_differs_only_along_its_edges(tmp_path):
    _, truth = draw_slide(4, "solid", 2000)
    write_geojson(tmp_path / "a.geojson", truth)
    loaded = read_geojson(tmp_path / "a.geojson", (2000, 2000), max_edge=700)
    assert loaded.mask.shape == (700, 700)
    assert intersection_over_union(loaded, truth) > 0.99


def test_a_blank_slide_comes_back_blank(tmp_path):
    write_geojson(tmp_path / "a.geojson", Tissue(np.zeros((8, 10), bool), (100.0, 100.0)))
    assert not read_geojson(tmp_path / "a.geojson", SLIDE_SIZE).mask.any()
    assert read_annotations(tmp_path / "a.geojson") == {}


def test_what_is_written_is_what_qupath_reads(tmp_path):
    mask = np.ones((4, 5), bool)
    mask[1, 1] = False
    write_geojson(tmp_path / "a.geojson", Tissue(mask, (200.0, 200.0)))
    content = json.loads((tmp_path / "a.geojson").read_text())
    (piece,) = content["features"]
    assert (content["type"], piece["type"], piece["geometry"]["type"]) == ("FeatureCollection", "Feature", "Polygon")
    assert piece["properties"]["objectType"] == "annotation"
    assert piece["properties"]["classification"]["name"] == "Tissue"
    outline, hole = piece["geometry"]["coordinates"]
    assert outline[0] == outline[-1] and hole[0] == hole[-1]  # rings are closed
    assert sorted(outline[:-1]) == [[0, 0], [0, 800], [1000, 0], [1000, 800]]  # along the edges of pixels
    assert sorted(hole[:-1]) == [[200, 200], [200, 400], [400, 200], [400, 400]]


def test_classes_of_all_spellings_and_geometries_of_all_kinds_are_read(tmp_path):
    tumour = feature("Polygon", [square(100, 100, 200), square(150, 150, 100)], classification={"name": "Tumor"})
    stroma = feature("MultiPolygon", [[square(500, 100, 50.5)], [square(600, 100, 50)]], classification="Stroma")
    nested = {
        "type": "GeometryCollection",
        "geometries": [tumour["geometry"], {"type": "Point", "coordinates": [1, 2]}],
    }
    other = {"type": "Feature", "geometry": nested, "properties": {"class": "Other"}}
    without = {"type": "Feature", "geometry": stroma["geometry"], "properties": None}
    empty = {"type": "Feature", "geometry": None, "properties": {}}
    for content in (
        {"type": "FeatureCollection", "features": [tumour, stroma, other, without, empty]},
        [tumour, stroma, other, without, empty],
    ):
        annotations = read_annotations(written(tmp_path, content), SLIDE_SIZE)
        assert {name: len(polygons) for name, polygons in annotations.items()} == {
            "Tumor": 1,
            "Stroma": 2,
            "Other": 1,
            UNCLASSIFIED: 2,
        }
    path = written(tmp_path, [tumour, stroma])
    assert area(read_geojson(path, SLIDE_SIZE, 1000, classes=["Tumor"])) == 200**2 - 100**2
    assert area(read_geojson(path, SLIDE_SIZE, 1000)) == pytest.approx(200**2 - 100**2 + 50.5**2 + 50**2, rel=0.01)
    assert read_annotations(written(tmp_path, tumour)).keys() == {"Tumor"}
    assert read_annotations(written(tmp_path, tumour["geometry"])).keys() == {UNCLASSIFIED}
    with pytest.raises(UserError, match="no class Fat: it has Tumor"):
        read_geojson(written(tmp_path, tumour), SLIDE_SIZE, classes=["Fat"])


def test_a_ring_counts_whether_it_is_closed_or_not_and_is_cut_off_at_the_slide(tmp_path):
    closed = square(900, 700, 200)  # half of it in x and y is beyond the slide
    for ring in (closed, closed[:-1], closed[::-1], [[*corner, 0.0] for corner in closed]):
        tissue = read_geojson(written(tmp_path, feature("Polygon", [ring])), SLIDE_SIZE, 1000)
        assert area(tissue) == 100 * 100


def test_polygons_that_overlap_count_once():
    polygons = [Polygon(np.array(square(x, 100, 100.0)[:-1])) for x in (100, 150)]
    assert area(draw_polygons(polygons, SLIDE_SIZE, 1000)) == 150 * 100


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not JSON", "cannot be read as GeoJSON"),
        ("\x00\x01", "cannot be read as GeoJSON"),
        ("17", "no GeoJSON"),
        ({"some": "object"}, "no GeoJSON"),
        ([feature("Point", [1, 2]), feature("LineString", [[1, 2], [3, 4]])], "2 features but no polygon"),
        ([feature("Polygon", [[[0, 0], [float("nan"), 5], [5, 5], [0, 0]]])], "feature 0 is damaged.*finite"),
        ([feature("Polygon", [[[0, 0], [1, float("inf")], [5, 5]]])], "feature 0 is damaged.*finite"),
        ([feature("Polygon", [[["0", "0"], ["1", "0"], ["5", "5"]]])], "feature 0 is damaged.*numbers"),
        ([feature("Polygon", [[[0, 0], [1], [5, 5]]])], "feature 0 is damaged"),
        ([feature("Polygon", [[[0, 0], [1, 10**400], [5, 5]]])], "feature 0 is damaged"),
        (
            [feature("Polygon", [square(0, 0, 9)]), feature("Polygon", [[[0, 0], [9, 9], [0, 0]]])],
            "feature 1.*2 corners",
        ),
        ([feature("Polygon", [[]])], "feature 0 is damaged"),
        ([feature("Circle", [1, 2])], "there is no geometry Circle"),
        ([{"type": "Feature", "geometry": {"type": "Polygon"}}], "feature 0 is damaged"),
        (["text"], "feature 0 is damaged"),
        ([feature("Polygon", [square(5000, 100, 50)])], "feature 0 lies outside the slide of 1000x800 px"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_path_and_the_feature(tmp_path, content, says):
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=f"slide.geojson.*{says}"):
        read_geojson(path, SLIDE_SIZE)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.geojson"):
        read_annotations(tmp_path / "absent.geojson")


def test_the_share_of_a_class_is_that_of_the_tiles_area():
    annotations = {
        "Tumor": [Polygon(np.array(square(100, 100, 100.0)[:-1])), Polygon(np.array(square(400, 400, 50.0)[:-1]))],
        "Stroma": [Polygon(np.array(square(150, 100, 100.0)[:-1]))],
    }
    xy = np.array([[100, 100], [150, 150], [350, 350], [600, 600]])
    shares = class_fractions(annotations, ["Stroma", "Tumor", "Fat"], SLIDE_SIZE, xy, (100.0, 100.0))
    assert shares.dtype == np.float32
    np.testing.assert_allclose(shares, [[0.5, 1, 0], [0.5, 0.25, 0], [0, 0.25, 0], [0, 0, 0]], atol=1e-6)


def test_polygons_have_no_corner_where_they_do_not_turn():
    mask = np.zeros((20, 20), bool)
    mask[2:18, 3:9] = True
    (polygon,) = polygons_of(Tissue(mask, (1.0, 1.0)))
    assert sorted(polygon.outline.tolist()) == [[3, 2], [3, 18], [9, 2], [9, 18]]
