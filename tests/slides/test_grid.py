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


@pytest.mark.parametrize("slide_mpp", [0.20, 0.2431, 0.25, 0.263, 0.29, 0.5, 0.55, (0.25, 0.2631)])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_a_tile_is_a_whole_number_of_stored_pixels_and_its_true_resolution_is_kept(ramp_slide, slide_mpp, mpp):
    slide = Slide(ramp_slide, slide_mpp)
    grid = tile_grid(slide, EVERYWHERE, key="a", size=224, mpp=mpp, partial=True)
    assert grid.mpp == mpp and grid.slide_mpp == slide.mpp
    scale = slide.level_for((grid.extent[0] / 224, grid.extent[1] / 224)).downsample
    stored = np.array(grid.extent) / scale
    assert np.array_equal(stored, np.rint(stored))
    # Half a percent, or half a stored pixel where that is more, and the true value is known exactly.
    assert np.array(grid.effective_mpp) == pytest.approx((mpp, mpp), rel=max(0.005, 0.5 / stored.min()))
    assert grid.effective_mpp == pytest.approx(np.array(grid.extent) * slide.mpp / 224)


def test_neighbouring_tiles_touch_without_gap_or_overlap(ramp_slide):
    grid = tile_grid(Slide(ramp_slide, 0.2431), EVERYWHERE, key="a", size=64, mpp=0.29)
    assert grid.extent == (76.0, 76.0)
    assert np.diff(np.unique(grid.xy[:, 0])).tolist() == [76] * (len(np.unique(grid.xy[:, 0])) - 1)


def test_a_tolerance_lets_tiles_fall_on_the_stored_ones(ramp_slide):
    slide = Slide(ramp_slide, 0.252)  # stored in tiles of 256 pixels
    exact = tile_grid(slide, EVERYWHERE, key="a", size=256, mpp=0.5, mpp_tolerance=0)
    aligned = tile_grid(slide, EVERYWHERE, key="a", size=256, mpp=0.5, mpp_tolerance=0.01)
    assert (exact.extent, aligned.extent) == ((508.0, 508.0), (512.0, 512.0))
    assert aligned.effective_mpp == (0.504, 0.504)
    assert (aligned.xy % 256 == 0).all()


def test_tiles_over_the_edge_are_made_when_asked_for_and_are_white_there(ramp_slide):
    inside = tile_grid(Slide(ramp_slide), EVERYWHERE, key="a", size=300, mpp=0.25)
    grid = tile_grid(Slide(ramp_slide), EVERYWHERE, key="a", size=300, mpp=0.25, partial=True, min_tissue=0.05)
    assert (len(inside), len(grid)) == (6 * 5, 7 * 6)
    last = grid.xy[-1]
    assert last.tolist() == [1800, 1500] and grid.tissue_fraction[-1] == pytest.approx(248 / 300 * 36 / 300)
    tiles, valid = grid.open(ramp_slide).read_tiles(grid.xy[-1:], 300, grid.extent)
    assert valid.all() and (tiles[0, 36:] == 255).all() and (tiles[0, :, 248:] == 255).all()
    assert tiles[0, :36, :248, 2].mean() == pytest.approx(128, abs=2)


def test_regions_are_kept_whole_and_their_tiles_lie_row_by_row(ramp_slide):
    mask = np.zeros((96, 128), bool)
    mask[:, :64] = True
    grid = tile_grid(Slide(ramp_slide), Tissue(mask, (16.0, 16.0)), key="a", size=64, mpp=0.5, region=4)
    assert grid.region == 4 and len(grid) == 2 * 3 * 16
    first = grid.xy[:16].reshape(4, 4, 2)
    assert first[0, :, 0].tolist() == [0, 128, 256, 384] and first[:, 0, 1].tolist() == [0, 128, 256, 384]
    assert grid.xy[16].tolist() == [512, 0]


def test_a_grid_of_absurdly_many_tiles_is_refused(ramp_slide, monkeypatch):
    monkeypatch.setattr("hf_pathology.slides.grid.MAX_CANDIDATES", 1000)
    with pytest.raises(SlideError, match="ramp.svs would have 3,072 tiles: choose a larger --size or --mpp"):
        tile_grid(Slide(ramp_slide), EVERYWHERE, key="a", size=32, mpp=0.25)


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
