import numpy as np
import pytest

from hf_pathology.errors import SlideError, UserError
from hf_pathology.slides.grid import TileGrid, tile_grid, tissue_fraction
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.tissue import Tissue


EVERYWHERE = Tissue(np.ones((96, 128), bool), (16.0, 16.0))


def test_tiles_cover_the_slide_without_leaving_it(ramp_slide):
    grid = tile_grid(Slide(ramp_slide), EVERYWHERE, key="a", size=100, mpp=0.5)
    assert len(grid) == (2048 // 200) * (1536 // 200)
    assert grid.xy.min() == 0
    assert (grid.xy + grid.extent <= (2048, 1536)).all()


def test_corners_do_not_drift_when_a_tile_is_no_whole_number_of_pixels(ramp_slide):
    grid = tile_grid(Slide(ramp_slide, 0.2431), EVERYWHERE, key="a", size=64, mpp=0.25)
    columns = np.unique(grid.xy[:, 0])
    assert np.abs(columns - np.arange(len(columns)) * 64 * 0.25 / 0.2431).max() <= 0.5


def test_overlapping_tiles_stand_a_stride_apart(ramp_slide):
    grid = tile_grid(Slide(ramp_slide), EVERYWHERE, key="a", size=128, mpp=0.25, stride=64)
    assert np.diff(np.unique(grid.xy[:, 0])).tolist() == [64] * 30


def test_tissue_fraction_is_the_exact_area():
    rng = np.random.default_rng(0)
    tissue = Tissue(rng.random((30, 40)) < 0.5, (10.0, 10.0))
    fine = np.kron(tissue.mask, np.ones((10, 10)))
    corners = np.stack([rng.integers(0, 330, 50), rng.integers(0, 230, 50)], axis=1)
    naive = [fine[y : y + 63, x : x + 63].mean() for x, y in corners]
    assert tissue_fraction(tissue, corners, (63.0, 63.0)) == pytest.approx(naive, abs=1e-6)


def test_only_tiles_with_enough_tissue_are_kept(ramp_slide):
    mask = np.zeros((96, 128), bool)
    mask[:, :64] = True
    grid = tile_grid(Slide(ramp_slide), Tissue(mask, (16.0, 16.0)), key="a", size=128, mpp=0.5, min_tissue=0.6)
    assert grid.xy[:, 0].max() == 768
    assert (grid.tissue_fraction >= 0.6).all()


def test_a_blank_slide_and_one_smaller_than_a_tile_are_refused_by_name(ramp_slide):
    nothing = Tissue(np.zeros((96, 128), bool), (16.0, 16.0))
    with pytest.raises(SlideError, match="ramp.svs has no tile with 50% tissue"):
        tile_grid(Slide(ramp_slide), nothing, key="a", size=128, mpp=0.5)
    with pytest.raises(SlideError, match="ramp.svs is smaller than one tile: 512x384 px at 1.0 mpp"):
        tile_grid(Slide(ramp_slide), EVERYWHERE, key="a", size=400, mpp=1.0)


def test_a_saved_grid_comes_back_the_same(ramp_slide, tmp_path):
    grid = tile_grid(Slide(ramp_slide), EVERYWHERE, key="sub/a.svs", size=96, mpp=0.5)
    grid.save(tmp_path / "grid.safetensors")
    copy = TileGrid.load(tmp_path / "grid.safetensors")
    assert np.array_equal(copy.xy, grid.xy) and np.array_equal(copy.tissue_fraction, grid.tissue_fraction)
    assert (copy.slide, copy.size, copy.mpp, copy.extent) == (grid.slide, grid.size, grid.mpp, grid.extent)
    assert (tmp_path / "grid.safetensors").stat().st_size < 10_000


def test_a_damaged_grid_is_named(tmp_path):
    (tmp_path / "grid.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(UserError, match="grid.safetensors cannot be read"):
        TileGrid.load(tmp_path / "grid.safetensors")
