import pickle
import shutil

import numpy as np
import pytest
from damage import spoil_tiles

from hf_pathology.errors import SlideError
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.reader import Slide


def place_of(pixels: np.ndarray) -> tuple[float, float]:
    """Where on the ramp slide the mean colour of `pixels` belongs, in level-0 pixels."""
    red, green = pixels.reshape(-1, 3).mean(axis=0)[:2]
    return red / 255 * 2047, green / 255 * 1535


@pytest.mark.parametrize("mpp", [0.25, 0.3, 0.5, 1.0, 2.0])
def test_a_tile_shows_the_same_place_at_every_resolution(ramp_slide, mpp):
    slide, size = Slide(ramp_slide), 128
    extent = slide.extent(size, mpp)
    tile = slide.read((480, 320), (size, size), mpp)
    assert tile.shape == (size, size, 3) and tile.dtype == np.uint8
    assert place_of(tile) == pytest.approx((480 + extent[0] / 2, 320 + extent[1] / 2), abs=10)


@pytest.mark.parametrize("mpp", [0.2, 0.2431, 0.25, 0.263, 0.29, 0.5, 0.55])
def test_extent_is_exact_for_any_resolution_of_the_slide(ramp_slide, mpp):
    assert Slide(ramp_slide, mpp).extent(256, 0.5) == pytest.approx((256 * 0.5 / mpp,) * 2)


def test_resolution_may_differ_between_x_and_y(ramp_slide):
    slide = Slide(ramp_slide, (0.25, 0.5))
    assert slide.extent(100, 0.5) == (200, 100)
    assert place_of(slide.read((0, 0), (100, 100), 0.5)) == pytest.approx((100, 50), abs=8)


def test_native_resolution_gives_the_stored_pixels(ramp_slide):
    slide = Slide(ramp_slide)
    stored = np.asarray(slide.handle.read_region((100, 60), 0, (64, 64)).convert("RGB"))
    assert np.array_equal(slide.read((100, 60), (64, 64), 0.25), stored)


def test_outside_of_the_slide_is_white(ramp_slide):
    tile = Slide(ramp_slide).read((2048, 0), (32, 32), 0.25)
    assert (tile == 255).all()


def test_overview_shows_the_whole_slide_and_says_its_scale(ramp_slide):
    overview, extent = Slide(ramp_slide).overview(512)
    assert overview.shape == (384, 512, 3)
    assert extent == (4.0, 4.0)
    assert overview[0, 0, 0] < 10 and overview[0, -1, 0] > 245


def test_a_slide_without_resolution_is_refused_by_name_with_the_remedy(tmp_path):
    path = tmp_path / "none.svs"
    write_aperio(path, np.full((512, 512, 3), 200, np.uint8), None)
    with pytest.raises(SlideError, match="none.svs does not declare its resolution: pass --slide-mpp"):
        _ = Slide(path).mpp
    assert Slide(path, 0.5).mpp == (0.5, 0.5)


def test_a_file_that_is_no_slide_is_named(tmp_path):
    path = tmp_path / "broken.svs"
    path.write_bytes(b"no slide at all")
    with pytest.raises(SlideError, match="broken.svs is no slide that OpenSlide can open"):
        _ = Slide(path).dimensions
    with pytest.raises(SlideError, match="gone.svs does not exist"):
        _ = Slide(tmp_path / "gone.svs").dimensions


def test_unreadable_tiles_are_marked_and_the_others_read(ramp_slide, tmp_path):
    path = tmp_path / "damaged.svs"
    shutil.copy(ramp_slide, path)
    spoil_tiles(path, 0)
    slide = Slide(path)
    tiles, valid = slide.read_tiles(np.array([[0, 0], [1500, 1200]]), 128, (128, 128))
    assert valid.tolist() == [False, True]
    assert np.array_equal(tiles[1], Slide(ramp_slide).read((1500, 1200), (128, 128), 0.25))


def test_a_slide_travels_to_another_process_without_its_handle(ramp_slide):
    slide = Slide(ramp_slide)
    _ = slide.dimensions
    copy = pickle.loads(pickle.dumps(slide))
    assert copy.dimensions == (2048, 1536)


def test_the_real_aperio_slide_is_read_at_half_its_resolution(real_data):
    with Slide(real_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        assert slide.mpp == pytest.approx((0.499, 0.499))
        tile = slide.read((600, 500), (224, 224), 0.998)
        plain = np.asarray(slide.handle.read_region((600, 500), 0, (448, 448)).convert("RGB").resize((224, 224)))
    assert np.abs(tile.astype(int) - plain).mean() < 2
