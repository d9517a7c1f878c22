import json

import numpy as np
import pytest

from hf_pathology.errors import SlideError, UserError
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cohort import find_slides
from hf_pathology.slides.geojson import write_geojson
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tiling import (
    GridOptions,
    grid_path,
    mask_path,
    overview_path,
    save_options,
    saved_options,
    tile_cohort,
)
from hf_pathology.slides.tissue import Tissue


OPTIONS = GridOptions(mpp=1.0, tile_size=64)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    write_aperio(folder / "good.svs", draw_slide(1, "glandular", 1024)[0], 0.5)
    write_aperio(folder / "blank.svs", draw_slide(2, None, 1024)[0], 0.5)
    write_aperio(folder / "mute.svs", draw_slide(3, "solid", 1024)[0], None)
    (folder / "broken.svs").write_bytes(b"II*\x00 and nothing more")
    return find_slides(folder)


def tiled(slide, folder, options):
    """The grid of one slide."""
    ((_, grid),) = tile_cohort([slide], folder, options)
    return grid


def test_good_slides_are_tiled_and_each_bad_one_says_why(slides, tmp_path):
    results = {slide.key: result for slide, result in tile_cohort(slides, tmp_path, OPTIONS)}
    assert isinstance(results["good.svs"], TileGrid) and len(results["good.svs"]) > 5
    reasons = {key: str(error) for key, error in results.items() if isinstance(error, SlideError)}
    assert "has no tile with 50% tissue" in reasons["blank.svs"]
    assert "does not declare its resolution" in reasons["mute.svs"]
    assert "is no slide that OpenSlide can open" in reasons["broken.svs"]
    written = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert written == ["good.svs.geojson", "good.svs.jpg", "good.svs.jpg", "good.svs.png", "good.svs.safetensors"]


def test_a_grid_is_found_again_and_made_again_when_asked_for_differently(slides, tmp_path):
    good = next(slide for slide in slides if slide.key == "good.svs")
    first = tiled(good, tmp_path, OPTIONS)
    stamp = grid_path(tmp_path, good.key).stat().st_mtime_ns
    assert np.array_equal(tiled(good, tmp_path, OPTIONS).xy, first.xy)
    assert grid_path(tmp_path, good.key).stat().st_mtime_ns == stamp
    other = tiled(good, tmp_path, GridOptions(mpp=1.0, tile_size=32))
    assert other.size == 32 and TileGrid.load(grid_path(tmp_path, good.key)).size == 32


def test_a_damaged_grid_is_made_again(slides, tmp_path):
    good = next(slide for slide in slides if slide.key == "good.svs")
    first = tiled(good, tmp_path, OPTIONS)
    grid_path(tmp_path, good.key).write_bytes(b"cut short")
    assert np.array_equal(tiled(good, tmp_path, OPTIONS).xy, first.xy)


def test_mask_and_picture_lie_beside_the_grid(slides, tmp_path):
    good = next(slide for slide in slides if slide.key == "good.svs")
    tiled(good, tmp_path, OPTIONS)
    assert mask_path(tmp_path, good.key).is_file() and overview_path(tmp_path, good.key).is_file()


def test_a_tiling_folder_knows_what_it_was_made_with(tmp_path):
    assert saved_options(tmp_path) is None
    options = GridOptions(mpp=0.5, tile_size=64, tissue="clam", classes=["a"], annotations=str(tmp_path), region=2)
    save_options(tmp_path, options)
    assert saved_options(tmp_path) == options
    (tmp_path / "tiling.json").write_text("{}")
    with pytest.raises(UserError, match="tiling.json cannot be read"):
        saved_options(tmp_path)


def test_corrected_outlines_decide_and_changing_them_makes_the_grid_again(slides, tmp_path):
    good = next(slide for slide in slides if slide.key == "good.svs")
    first = tiled(good, tmp_path / "tiles", OPTIONS)
    outline = tmp_path / "corrected" / "good.geojson"
    whole = Tissue(np.ones((64, 64), bool), (16.0, 16.0))
    write_geojson(outline, whole)
    options = GridOptions(mpp=1.0, tile_size=64, masks=str(outline.parent))
    corrected = tiled(good, tmp_path / "tiles", options)
    assert len(first) < len(corrected) == 64
    half = Tissue(np.arange(64)[:, None].repeat(64, 1) < 32, (16.0, 16.0))
    write_geojson(outline, half)
    assert len(tiled(good, tmp_path / "tiles", options)) == 32


def test_only_tiles_of_the_chosen_classes_are_kept_and_their_shares_recorded(slides, tmp_path):
    good = next(slide for slide in slides if slide.key == "good.svs")
    boxes = {"tumour": (0, 0, 512, 1024), "stroma": (512, 0, 1024, 1024)}
    features = []
    for name, (x0, y0, x1, y1) in boxes.items():
        ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        properties = {"classification": {"name": name}}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    path = tmp_path / "annotations" / "good.svs.geojson"
    path.parent.mkdir()
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    options = GridOptions(mpp=1.0, tile_size=64, annotations=str(path.parent), classes=["stroma"])
    grid = tiled(good, tmp_path / "tiles", options)
    assert grid.classes == ("stroma",) and (grid.xy[:, 0] >= 512).all()
    assert grid.class_fraction == pytest.approx(np.ones((len(grid), 1)), abs=0.01)
    options.classes = ["necrosis"]
    assert "has no tile of necrosis" in str(tiled(good, tmp_path / "tiles", options))


def test_a_damaged_outline_fails_its_slide_alone_and_a_missing_folder_is_refused(slides, tmp_path):
    good = next(slide for slide in slides if slide.key == "good.svs")
    for name in ("masks", "annotations"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good.svs.geojson").write_text("no JSON")
        options = GridOptions(mpp=1.0, tile_size=64, **{name: str(tmp_path / name)})
        result = tiled(good, tmp_path / "tiles", options)
        assert isinstance(result, SlideError) and "good.svs.geojson cannot be read as GeoJSON" in str(result)
        with pytest.raises(UserError, match=f"{name} is nowhere: it must be a folder of GeoJSON files"):
            GridOptions(mpp=1.0, tile_size=64, **{name: "nowhere"})
