"""The attention of a hierarchy over slides: regions in their places, heads, passes, and what the command writes."""

import re
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
from hierarchies import REGION, TILE, release_hierarchy
from programs import run_command

from hf_pathology.features.encoder import load_encoder
from hf_pathology.report.region_attention import region_attention
from hf_pathology.report.region_scores import enlarge, ranks_among
from hf_pathology.report.slide_attention import Drawing, slide_attention
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.grid import tile_grid
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tissue import Tissue


EDGE = TILE * REGION
ONE_PASS = {"region_passes": 1, "tile_passes": 1}


@pytest.fixture(scope="module")
def hierarchy(tmp_path_factory) -> Path:
    return release_hierarchy(tmp_path_factory.mktemp("release") / "hierarchy")


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    write_aperio(folder / "a.svs", draw_slide(0, "glandular", 512)[0], 0.5)
    return folder


def grid_of(slide: Slide, **options):
    tissue = Tissue(np.ones((8, 8), bool), (slide.dimensions[0] / 8, slide.dimensions[1] / 8))
    return tile_grid(slide, tissue, key="a", size=TILE, mpp=0.5, min_tissue=0.0, region=REGION, **options)


def test_one_pass_is_the_ranks_of_the_attention_itself(hierarchy):
    encoder, region = load_encoder(hierarchy), draw_slide(1, "solid", 512)[0][:EDGE, :EDGE]
    found = region_attention(encoder.hierarchy, region, encoder.region_pixels, pixel=4, shift=16, **ONE_PASS)
    seen = encoder.hierarchy.attention(encoder.region_pixels(region))
    expected = ranks_among(enlarge(seen.regions[0].numpy(), TILE // 4), axes=2)
    np.testing.assert_allclose(found.regions.scores, expected, atol=1e-6)
    tile = ranks_among(enlarge(seen.tiles[0, 1, 2].numpy(), 2), axes=2)
    np.testing.assert_allclose(found.tiles.scores[:, 8:16, 16:24], tile, atol=1e-6)


def test_regions_lie_in_their_places_whatever_lies_around_them(hierarchy, slides):
    encoder, drawing = load_encoder(hierarchy), Drawing(pixel=8, shift=16)
    with Slide(slides / "a.svs") as slide:
        grid = grid_of(slide)
        found = slide_attention(slide, grid, encoder, drawing)
        alone = slide_attention(slide, grid.select(np.arange(len(grid)) < REGION**2), encoder, drawing)
    edge = EDGE // 8
    assert found.covered.shape == (64, 64) and found.covered.all() and found.mpp == pytest.approx(4.0)
    assert alone.covered.sum() == edge**2
    for name, scores in found.maps.items():
        np.testing.assert_array_equal(scores[:edge, :edge], alone.maps[name][:edge, :edge])
        assert 0 <= scores.min() < scores.max() <= 1


def test_a_region_over_the_edge_of_the_slide_is_drawn_as_far_as_the_slide_goes(hierarchy, tmp_path):
    write_aperio(tmp_path / "b.svs", draw_slide(0, "glandular", 512)[0][:200, :300], 0.5)
    with Slide(tmp_path / "b.svs") as slide:
        found = slide_attention(
            slide, grid_of(slide, partial=True), load_encoder(hierarchy), Drawing(pixel=8, shift=16)
        )
    assert found.covered.shape == (25, 38) and found.covered.all()


def test_heads_differ_and_their_mean_is_the_default(hierarchy, slides):
    encoder, maps = load_encoder(hierarchy), []
    with Slide(slides / "a.svs") as slide:
        grid = grid_of(slide)
        grid = grid.select(np.arange(len(grid)) < REGION**2)
        for head in (0, 1, None):
            maps.append(slide_attention(slide, grid, encoder, Drawing(head, head, pixel=8, shift=16)).maps)
    for name in ("regions", "tiles"):
        assert not np.allclose(maps[0][name], maps[1][name])
        np.testing.assert_allclose((maps[0][name] + maps[1][name]) / 2, maps[2][name], atol=1e-6)


def test_the_command_writes_a_picture_maps_and_a_pyramid_that_openslide_opens(hierarchy, slides, tmp_path):
    done = run_command("heatmap", slides, "--encoder", hierarchy, "--out", tmp_path, "--pixel", 2)
    assert done.returncode == 0, done.stderr
    maps = np.load(tmp_path / "a.svs.npz")
    assert maps["factorised"].shape == maps["covered"].shape == (256, 256)
    with openslide.OpenSlide(tmp_path / "a.svs.attention.svs") as pyramid:
        assert pyramid.dimensions == (256, 256)
        assert float(pyramid.properties["openslide.mpp-x"]) == pytest.approx(float(maps["mpp"]), rel=1e-3)
    assert cv2.imread(str(tmp_path / "a.svs.png")).std() > 20
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg") == 1 and "a.svs" in page and "Factorised: both together" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--region-head", 2], "region_head is 2: .* has heads 0 to 1 there"),
        (["--tile-head", -1], "tile_head is -1"),
        (["--pixel", 3], "pixel is 3: it must divide the edge of a patch, 8 px"),
        (["--head", "h", "--features", "f"], "say whose attention"),
        (["--features", "f"], "say whose attention"),
    ],
)
def test_a_mistake_is_one_line(hierarchy, slides, tmp_path, options, message):
    done = run_command("heatmap", slides, "--encoder", hierarchy, "--out", tmp_path, *options)
    assert done.returncode == 1
    assert re.search(message, done.stderr)
