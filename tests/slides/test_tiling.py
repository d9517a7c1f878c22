import numpy as np
import pytest

from hf_pathology.errors import SlideError
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cohort import find_slides
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tiling import GridOptions, grid_path, mask_path, overview_path, tile_cohort


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
