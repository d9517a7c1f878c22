from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tifffile

from hf_pathology.errors import SlideError
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cohort import find_slides
from hf_pathology.slides.grid import TileGrid, tile_grid
from hf_pathology.slides.integrity import look_at, stored_tiles_under, verified
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tiling import GridOptions, tile_cohort
from hf_pathology.slides.tissue import Tissue


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("integrity") / "slide.svs"
    write_aperio(path, draw_slide(1, "glandular", 2048)[0], 0.5, quality=75)
    return path


def grid_of(path):
    slide = Slide(path)
    everywhere = Tissue(np.ones((1, 1), bool), tuple(map(float, slide.dimensions)))
    return tile_grid(slide, everywhere, key=path.name, size=128, mpp=0.5)


def stored_places(path):
    with tifffile.TiffFile(path) as tiff:
        return tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts


def changed(path, copy, place, value):
    content = bytearray(path.read_bytes())
    content[place] ^= value
    copy.write_bytes(bytes(content))
    return copy


def test_nothing_is_suspect_on_a_whole_slide(slide_path):
    slide, grid = Slide(slide_path), grid_of(slide_path)
    level = slide.level_for((1.0, 1.0))
    numbers = stored_tiles_under(level, grid.xy, grid.extent)
    assert numbers.tolist() == list(range(64))
    found = look_at(slide, level, numbers)
    assert found.compared and not found.suspect.any()
    checked = verified(grid, slide)
    assert len(checked) == len(grid) and checked.quality["suspect_tiles"] == 0


def test_what_is_damaged_visibly_is_found_and_left_out(slide_path, tmp_path):
    offsets, counts = stored_places(slide_path)
    rng, outcomes, wrong = np.random.default_rng(0), Counter(), []
    whole, grid = Slide(slide_path), grid_of(slide_path)
    expected, _ = whole.read_tiles(grid.xy, 128, grid.extent)
    for _ in range(60):
        number = int(rng.integers(64))
        place = offsets[number] + int(rng.integers(counts[number]))
        path = changed(slide_path, tmp_path / "damaged.svs", place, 1 << int(rng.integers(8)))
        slide = Slide(path)
        level = slide.level_for((1.0, 1.0))
        suspect = look_at(slide, level, np.array([number])).suspect[0]
        tiles, valid = slide.read_tiles(grid.xy, 128, grid.extent)
        difference = np.abs(np.asarray(tiles).astype(int) - expected).mean(axis=(1, 2, 3))[valid]
        outcomes["suspect" if suspect else "not noticed"] += 1
        if not suspect:
            wrong.append(difference.max())
    assert outcomes["suspect"] >= 15
    assert max(wrong) < 16  # of 255: what goes unnoticed is a shade


def test_too_much_damage_fails_the_slide_by_name(slide_path, tmp_path):
    offsets, _ = stored_places(slide_path)
    content = bytearray(slide_path.read_bytes())
    for offset in offsets[::8]:
        content[offset : offset + 64] = bytes(64)
    path = tmp_path / "damaged.svs"
    path.write_bytes(bytes(content))
    with pytest.raises(SlideError, match=r"damaged.svs has \d+ of 256 tiles whose stored pixels are damaged"):
        verified(grid_of(path), Slide(path))


def test_any_later_change_of_a_stored_tile_is_noticed_when_it_is_read(slide_path, tmp_path):
    grid = verified(grid_of(slide_path), Slide(slide_path))
    offsets, counts = stored_places(slide_path)
    rng = np.random.default_rng(1)
    expected, _ = grid.open(slide_path).read_tiles(grid.xy, 128, grid.extent)
    for _ in range(100):
        number = int(rng.integers(64))
        place = offsets[number] + int(rng.integers(counts[number]))
        path = changed(slide_path, tmp_path / "damaged.svs", place, 1 << int(rng.integers(8)))
        status = path.stat()  # a change that size and time of the file do not show
        unseen = replace(grid, stored=replace(grid.stored, file_bytes=status.st_size, file_time=status.st_mtime_ns))
        tiles, valid = unseen.open(path).read_tiles(grid.xy, 128, grid.extent)
        assert (~valid).sum() == 4  # the stored tile holds four
        assert np.array_equal(np.asarray(tiles)[valid], np.asarray(expected)[valid])


def test_checksums_are_saved_with_the_grid(slide_path, tmp_path):
    grid = verified(grid_of(slide_path), Slide(slide_path))
    grid.save(tmp_path / "grid.safetensors")
    copy = TileGrid.load(tmp_path / "grid.safetensors")
    assert np.array_equal(copy.checksums.values, grid.checksums.values) and copy.checksums.level == 0


def test_a_slide_of_one_level_is_only_decoded(tmp_path):
    path = tmp_path / "single.svs"
    write_aperio(path, draw_slide(1, "glandular", 512)[0], 0.5, downsamples=(1,))
    assert verified(grid_of(path), Slide(path)).quality["verified"].startswith("decoded only")


@pytest.mark.parametrize(
    "how", [{"mpp": 0.5}, {"mpp": 1.0, "half_scale": True}, {"mpp": 1.0}, {"mpp": 0.5, "region": 2}]
)
def test_tiling_verifies_when_asked_to(slide_path, tmp_path, how):
    slides = find_slides(slide_path)
    options = GridOptions(tile_size=128, verify=True, **how)
    ((_, grid),) = tile_cohort(slides, tmp_path, options)
    assert grid.checksums is not None and grid.quality["verified"] == "against a coarser level"
    ((_, again),) = tile_cohort(slides, tmp_path, options)
    assert np.array_equal(again.checksums.numbers, grid.checksums.numbers)
    assert grid.quality["suspect_tiles"] == 0
    _, valid = grid.open(slide_path).read_tiles(grid.xy, 128, grid.extent)
    assert valid.all()
