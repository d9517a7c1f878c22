"""Coordinates of other programs: files as these write them give known corners and extents, and files of ours are theirs."""

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
from openslide.deepzoom import DeepZoomGenerator
from safetensors.numpy import load_file

from hf_pathology.errors import UserError
from hf_pathology.slides.deepzoom import deepzoom_corners, read_owkin_npy, write_owkin_npy
from hf_pathology.slides.exchange import (
    read_clam_h5,
    read_intelligens_npy,
    write_clam_h5,
    write_intelligens_npy,
    write_trident_h5,
)
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.hs2p import read_hs2p, write_hs2p_npz
from hf_pathology.slides.reader import Slide


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
CORNERS = np.array([[0, 0], [512, 0], [0, 512], [512, 512], [1024, 512]])


@pytest.fixture
def slide(ramp_slide) -> Slide:
    """2048 x 1536 pixels at 0.25 mpp, levels 1 and 4."""
    return Slide(ramp_slide)


@pytest.fixture
def grid(slide) -> TileGrid:
    """Tiles of 256 pixels at 0.5 mpp: 512 level-0 pixels."""
    return TileGrid(
        slide="case/a.svs",
        size=256,
        mpp=0.5,
        slide_mpp=(0.25, 0.25),
        extent=(512.0, 512.0),
        stride=(512.0, 512.0),
        slide_size=slide.dimensions,
        xy=CORNERS,
        tissue_fraction=np.linspace(0.5, 1, 5, dtype=np.float32),
        options={"min_tissue": 0.5},
    )


def as_clam(path: Path, coords: np.ndarray, **changes) -> Path:
    """A file of coordinates with the datasets, types, chunks and attributes that CLAM gives it."""
    attributes = {
        "patch_size": 256,
        "patch_level": 1,
        "downsample": (4.0003, 4.0003),
        "downsampled_level_dim": (512, 384),
        "level_dim": (512, 384),
        "name": "a",
        "save_path": "out/patches",
    }
    attributes |= changes
    with h5py.File(path, "w") as file:
        data = file.create_dataset("coords", data=coords, maxshape=(None, *coords.shape[1:]), chunks=(1, 2))
        data.attrs.update({name: value for name, value in attributes.items() if value is not None})
    return path


def as_trident(path: Path, coords: np.ndarray, **changes) -> Path:
    """A file of coordinates as TRIDENT writes it for 256 pixels at 20x on a 40x slide."""
    attributes = {
        "patch_size": 256,
        "patch_size_level0": 512,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": "a",
        "savetodir": "out/20x_256px_0px_overlap",
        "level0_width": 2048,
        "level0_height": 1536,
    }
    with h5py.File(path, "w") as file:
        data = file.create_dataset("coords", data=coords.astype(np.int64), maxshape=(None, 2), chunks=(1, 2))
        data.attrs.update(attributes | changes)
    return path


def same_tiles(one: TileGrid, other: TileGrid) -> bool:
    sizes = (one.size, one.slide_mpp, one.extent, one.slide_size) == (
        other.size,
        other.slide_mpp,
        other.extent,
        other.slide_size,
    )
    return sizes and np.allclose(one.stride, other.stride) and np.array_equal(one.xy, other.xy)


def test_a_clam_file_of_a_coarse_level_has_the_extent_of_its_fractional_downsample(slide, tmp_path):
    grid = read_clam_h5(as_clam(tmp_path / "a.h5", np.array([[0, 0], [1024, 0], [0, 1024]])), slide, "a.svs")
    assert grid.extent == pytest.approx((1024.0768, 1024.0768), abs=1e-9)
    assert grid.stride == grid.extent  # gaps of 1024 are the extent, rounded
    assert (grid.slide, grid.size, grid.slide_size) == ("a.svs", 256, (2048, 1536))
    assert grid.mpp == pytest.approx(1.000075)
    assert grid.xy.dtype == np.int64 and grid.xy.tolist() == [[0, 0], [1024, 0], [0, 1024]]
    assert np.isnan(grid.tissue_fraction).all() and grid.options == {}


def test_what_a_clam_file_lacks_comes_from_the_slide_and_the_caller(slide, tmp_path):
    path = as_clam(tmp_path / "a.h5", CORNERS[:2], downsample=None, level_dim=None)
    grid = read_clam_h5(path, slide, "a.svs", size=224, mpp=1.2)
    assert (grid.extent, grid.size, grid.mpp) == ((1024.0, 1024.0), 224, 1.2)
    with pytest.raises(UserError, match="does not say its patch_size"):
        read_clam_h5(as_clam(tmp_path / "b.h5", CORNERS, patch_size=None), slide, "a.svs")
    with pytest.raises(UserError, match="neither patch_level .CLAM. nor target_magnification"):
        read_clam_h5(as_clam(tmp_path / "c.h5", CORNERS, patch_level=None), slide, "a.svs")


def test_the_corners_of_a_clam_file_show_the_pixels_that_clam_reads(slide, tmp_path):
    path = as_clam(tmp_path / "a.h5", CORNERS, patch_level=0, downsample=(1.0, 1.0), level_dim=(2048, 1536))
    grid = read_clam_h5(path, slide, "a.svs")
    handle = openslide.OpenSlide(slide.path)
    for x, y in grid.xy.tolist():
        expected = np.asarray(handle.read_region((x, y), 0, (256, 256)).convert("RGB"))
        np.testing.assert_array_equal(slide.read((x, y), (grid.size, grid.size), grid.mpp), expected)
    tiles, valid = slide.read_tiles(grid.xy, grid.size, grid.extent)
    assert valid.all()
    np.testing.assert_array_equal(tiles[-1], expected)


def test_the_distance_of_overlapping_tiles_is_found_in_clams_corners(slide, tmp_path):
    coords = np.array([[x, y] for x in range(100, 900, 128) for y in (70, 198, 326)])
    grid = read_clam_h5(
        as_clam(tmp_path / "a.h5", coords, patch_level=0, downsample=1, level_dim=(2048, 1536)), slide, "a"
    )
    assert (grid.extent, grid.stride) == ((256.0, 256.0), (128.0, 128.0))


def test_a_trident_file_at_20x_of_a_40x_slide_has_tiles_of_512_pixels(slide, tmp_path):
    grid = read_clam_h5(as_trident(tmp_path / "a.h5", CORNERS), slide, "a.svs")
    assert (grid.size, grid.mpp, grid.extent, grid.stride) == (256, 0.5, (512.0, 512.0), (512.0, 512.0))
    overlapping = read_clam_h5(as_trident(tmp_path / "b.h5", CORNERS, overlap=64), slide, "a.svs")
    assert overlapping.stride == (384.0, 384.0)
    assert np.array_equal(grid.xy, CORNERS)


def test_tridents_magnification_is_what_was_meant_and_the_slide_says_what_the_tiles_are(ramp_slide, tmp_path):
    grid = read_clam_h5(as_trident(tmp_path / "a.h5", CORNERS), Slide(ramp_slide, mpp=0.29), "a.svs")
    assert grid.mpp == 0.5  # TRIDENT calls 0.29 mpp a 40x slide
    assert grid.effective_mpp == pytest.approx((0.58, 0.58))


def test_a_file_of_another_slide_is_refused(slide, tmp_path):
    with pytest.raises(UserError, match="made from a slide of 2048x1600"):
        read_clam_h5(as_trident(tmp_path / "a.h5", CORNERS, level0_height=1600), slide, "a.svs")
    with pytest.raises(UserError, match="made from a slide of 512x400"):
        read_clam_h5(as_clam(tmp_path / "b.h5", CORNERS, level_dim=(512, 400)), slide, "a.svs")
    with pytest.raises(UserError, match="about level 3.*has 2 levels"):
        read_clam_h5(as_clam(tmp_path / "c.h5", CORNERS, patch_level=3), slide, "a.svs")
    with pytest.raises(UserError, match="outside the slide"):
        read_clam_h5(as_trident(tmp_path / "d.h5", CORNERS + 1600), slide, "a.svs")


def test_what_is_written_for_clam_says_the_same_to_both_programs(grid, slide, tmp_path):
    write_clam_h5(grid, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        coords, attributes = file["coords"], dict(file["coords"].attrs)
        assert coords.chunks is None and coords.dtype == np.int64
    clam_edge = attributes["patch_size"] * attributes["downsample"]
    trident_edge = attributes["patch_size"] * attributes["level0_magnification"] / attributes["target_magnification"]
    assert clam_edge.tolist() == [512, 512] and trident_edge == attributes["patch_size_level0"] == 512
    assert (attributes["patch_level"], attributes["level0_magnification"], attributes["overlap"]) == (0, 40, 0)
    assert same_tiles(grid, read_clam_h5(tmp_path / "a.h5", slide, grid.slide, size=256))
    assert read_clam_h5(tmp_path / "a.h5", slide, grid.slide, size=256).mpp == 0.5


def test_what_is_written_for_trident_comes_back(grid, slide, tmp_path):
    fractional = replace(grid, extent=(510.3, 510.3), stride=(255.15, 255.15))
    for each in (grid, fractional):
        write_trident_h5(each, tmp_path / "a.h5")
        back = read_clam_h5(tmp_path / "a.h5", slide, grid.slide)
        assert (back.size, back.mpp) == (256, 0.5)
        assert back.extent == pytest.approx(each.extent) and back.stride == pytest.approx(each.stride)
        assert np.array_equal(back.xy, grid.xy)


def test_owkins_addresses_are_those_of_openslide_on_every_level(slide, tmp_path):
    pyramid = DeepZoomGenerator(slide.handle, tile_size=224, overlap=0, limit_bounds=False)
    for level, (columns, rows) in enumerate(pyramid.level_tiles):
        addresses = np.array([[level, column, row] for column in range(columns) for row in range(rows)])
        corners, edge = deepzoom_corners("a.npy", addresses, 224, slide.dimensions)
        expected = [pyramid.get_tile_coordinates(level, (column, row))[0] for _, column, row in addresses]
        assert corners.tolist() == [list(corner) for corner in expected]
        assert edge == 224 * 2 ** (pyramid.level_count - 1 - level)
    np.save(tmp_path / "coords.npy", np.array([[10, 0, 0], [10, 1, 2]]))
    grid = read_owkin_npy(tmp_path / "coords.npy", slide, "a.svs", size=224)
    assert (grid.size, grid.mpp, grid.extent, grid.stride) == (224, 0.5, (448.0, 448.0), (448.0, 448.0))
    assert grid.xy.tolist() == [[0, 0], [448, 896]]


def test_owkins_addresses_on_a_real_slide_show_the_tiles_that_deep_zoom_shows(goldens, real_data, tmp_path):
    golden = load_file(goldens / "16_slide_CMU-1-Small-Region.safetensors")
    addresses = golden["output/tile_addresses_level_col_row"]
    with Slide(real_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        pyramid = DeepZoomGenerator(slide.handle, tile_size=224, overlap=0, limit_bounds=False)
        for level, column, row in addresses.tolist():
            np.save(tmp_path / "coords.npy", np.array([[level, column, row]]))
            grid = read_owkin_npy(tmp_path / "coords.npy", slide, "CMU-1-Small-Region.svs", size=224)
            assert tuple(grid.xy[0].tolist()) == pyramid.get_tile_coordinates(level, (column, row))[0]
            write_owkin_npy(grid, tmp_path / "back.npy")
            assert np.load(tmp_path / "back.npy").tolist() == [[level, column, row]]
        tile = slide.read((5 * 224, 4 * 224), (224, 224), slide.mpp[0])
    np.testing.assert_array_equal(tile, golden["output/tile_L12_c5_r4"])


def test_owkins_addresses_come_back_and_are_refused_off_the_lattice(grid, slide, tmp_path):
    write_owkin_npy(grid, tmp_path / "coords.npy")
    assert same_tiles(grid, read_owkin_npy(tmp_path / "coords.npy", slide, grid.slide, size=256))
    assert np.load(tmp_path / "coords.npy").dtype == np.int64
    with pytest.raises(UserError, match="only ratios of 1, 2, 4"):
        write_owkin_npy(replace(grid, extent=(510.3, 510.3)), tmp_path / "coords.npy")
    with pytest.raises(UserError, match=r"tile at \[3, 3\].*only multiples of 512"):
        write_owkin_npy(replace(grid, xy=grid.xy + 3), tmp_path / "coords.npy")


def test_intelligens_corners_lie_beside_the_slide_and_come_back(grid, slide, tmp_path):
    native = replace(grid, mpp=0.25, extent=(256.0, 256.0))
    write_intelligens_npy(native, tmp_path / "a.npy")
    assert np.load(tmp_path / "a.npy").tolist() == CORNERS.tolist()
    assert same_tiles(native, read_intelligens_npy(tmp_path / "a.npy", slide, grid.slide))
    with pytest.raises(UserError, match="INTELLIGENS reads 256 pixels of level 0.*have 512"):
        write_intelligens_npy(grid, tmp_path / "a.npy")


def test_coordinates_of_hs2p_come_back_with_the_shares_of_tissue(grid, slide, tmp_path):
    path = tmp_path / "a.coordinates.npz"
    write_hs2p_npz(grid, path)
    back = read_hs2p(path, slide, grid.slide)
    assert same_tiles(grid, back) and back.mpp == 0.5
    assert np.array_equal(back.tissue_fraction, grid.tissue_fraction)


def test_coordinates_as_hs2p_writes_them_are_read(slide, tmp_path):
    x, y = np.array([0, 0, 336]), np.array([0, 336, 0])
    np.savez_compressed(
        tmp_path / "a.coordinates.npz",
        tile_index=np.arange(3, dtype=np.int32),
        x=x,
        y=y,
        tissue_fractions=np.array([0.2, 1, 0.7], np.float32),
    )
    meta = {
        "provenance": {"sample_id": "a", "image_path": "/data/a.svs"},
        "slide": {"dimensions": [2048, 1536], "base_spacing_um": 0.2501, "level_downsamples": [1.0, 4.0]},
        "tiling": {
            "requested_tile_size_px": 224,
            "requested_spacing_um": 0.5,
            "tile_size_lv0": 448,
            "step_px_lv0": 336,
            "overlap": 0.25,
            "n_tiles": 3,
        },
    }
    (tmp_path / "a.coordinates.meta.json").write_text(json.dumps(meta))
    grid = read_hs2p(tmp_path / "a.coordinates.npz", slide, "a.svs")
    assert (grid.size, grid.mpp, grid.extent, grid.stride) == (224, 0.5, (448.0, 448.0), (336.0, 336.0))
    assert grid.slide_mpp == (0.2501, 0.2501) and grid.xy.tolist() == [[0, 0], [0, 336], [336, 0]]
    (tmp_path / "a.coordinates.meta.json").write_text("{}")
    with pytest.raises(UserError, match="no section 'tiling'"):
        read_hs2p(tmp_path / "a.coordinates.npz", slide, "a.svs")


def test_the_older_records_of_hs2p_are_read(slide, tmp_path):
    kinds = [("x", int), ("y", int), ("tile_size_resized", int), ("tile_level", int), ("resize_factor", float)]
    kinds += [("tile_size_lv0", int), ("target_spacing", float)]
    np.save(
        tmp_path / "a.npy", np.array([(0, 0, 448, 0, 2.0, 448, 0.5), (448, 0, 448, 0, 2.0, 448, 0.5)], dtype=kinds)
    )
    grid = read_hs2p(tmp_path / "a.npy", slide, "a.svs")
    assert (grid.size, grid.mpp, grid.extent, grid.xy.tolist()) == (224, 0.5, (448.0, 448.0), [[0, 0], [448, 0]])
    np.save(tmp_path / "b.npy", CORNERS)
    with pytest.raises(UserError, match="not the records of hs2p"):
        read_hs2p(tmp_path / "b.npy", slide, "a.svs")


class Malicious:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_an_array_of_python_objects_is_refused_and_its_code_does_not_run(slide, tmp_path):
    np.save(tmp_path / "a.npy", np.array([[Malicious(tmp_path / "ran"), 1]], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    np.savez(tmp_path / "c.npz", x=np.array([Malicious(tmp_path / "ran")], dtype=object))
    for name in ("a.npy", "b.npy"):
        with pytest.raises(UserError, match="cannot be read as npy"):
            read_intelligens_npy(tmp_path / name, slide, "a.svs")
    with pytest.raises(UserError, match="cannot be read as npz"):
        read_hs2p(tmp_path / "c.npz", slide, "a.svs")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "corners, message",
    [
        (np.zeros((3, 3)), r"shape \(3, 3\): they must be \(N, 2\)"),
        (np.zeros((0, 2)), "shape|cannot be read"),
        (np.array([[0.0, np.nan]]), r"tile at \[0.0, nan\], outside the slide"),
        (np.array([[0.0, np.inf]]), "outside the slide"),
        (np.array([[0, 0], [-1, 5]]), r"tile at \[-1, 5\], outside the slide"),
        (np.array([[2**62, 0]]), "outside the slide"),
        (np.array([["0", "1"]]), "of type <U1, not numbers"),
    ],
)
def test_coordinates_that_cannot_be_meant_are_refused_in_one_line(slide, tmp_path, corners, message):
    np.save(tmp_path / "a.npy", corners)
    with pytest.raises(UserError, match=message) as caught:
        read_intelligens_npy(tmp_path / "a.npy", slide, "a.svs")
    assert "\n" not in str(caught.value) and "a.npy" in str(caught.value)


@pytest.mark.parametrize("size", [0, 20, 700])
def test_a_truncated_file_is_refused_in_one_line(grid, slide, tmp_path, size):
    writers = {"a.h5": write_clam_h5, "a.npy": write_owkin_npy, "a.coordinates.npz": write_hs2p_npz}
    for name, write in writers.items():
        write(grid, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: min(size, len(content) - 8)])
    readers = {
        "a.h5": lambda path: read_clam_h5(path, slide, "a"),
        "a.npy": lambda path: read_owkin_npy(path, slide, "a", size=256),
        "a.coordinates.npz": lambda path: read_hs2p(path, slide, "a"),
    }
    for name, read in readers.items():
        with pytest.raises(UserError, match="cannot be read as") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="does not exist"):
            read(tmp_path / ("no" + name))


def test_a_file_that_claims_more_than_it_holds_is_refused(slide, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("coords", shape=(10**10, 2), dtype=np.int64, chunks=(1024, 2))
    with pytest.raises(UserError, match="claims to hold"):
        read_clam_h5(tmp_path / "a.h5", slide, "a")
    with pytest.raises(UserError, match="tiles of 1e.09 px"):
        read_clam_h5(as_trident(tmp_path / "b.h5", CORNERS, patch_size=10**9), slide, "a")
    for wrong in (float("nan"), -4, 0, "40x", [1, 2]):
        with pytest.raises(UserError, match="level0_magnification is .* must be a positive number"):
            read_clam_h5(as_trident(tmp_path / "c.h5", CORNERS, level0_magnification=wrong), slide, "a")


@pytest.mark.parametrize(
    "wrong",
    [
        {"overlap": "wide"},
        {"overlap": 256},
        {"level0_width": "None"},
        {"patch_level": "x"},
        {"patch_level": 1, "level_dim": 3},
    ]
    + [{"patch_level": 1, "downsample": (1, 2, 3)}, {"patch_level": 0, "downsample": np.nan}],
)
def test_attributes_that_make_no_sense_are_refused_in_one_line(slide, tmp_path, wrong):
    with pytest.raises(UserError, match="a.h5") as caught:
        read_clam_h5(as_trident(tmp_path / "a.h5", CORNERS, **wrong), slide, "a")
    assert "\n" not in str(caught.value)


def test_an_h5_that_points_to_another_file_is_refused(slide, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(160))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("coords", (10, 2), np.int64, external=[(str(tmp_path / "secret"), 0, 160)])
    as_clam(tmp_path / "target.h5", CORNERS)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["coords"] = h5py.ExternalLink(str(tmp_path / "target.h5"), "coords")
    for name in ("a.h5", "b.h5"):
        with pytest.raises(UserError, match="keeps 'coords' in another file"):
            read_clam_h5(tmp_path / name, slide, "a")


def test_the_python_of_the_document_on_coordinates_runs(grid, ramp_slide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").symlink_to(ramp_slide)
    native = replace(grid, mpp=0.25, extent=(256.0, 256.0), stride=(256.0, 256.0))
    write_clam_h5(grid, "patches/a.h5")
    write_owkin_npy(grid, "coords_256/a.svs/coords.npy")
    write_intelligens_npy(native, "slides/a.npy")
    write_hs2p_npz(grid, "tiles/a.coordinates.npz")
    part = DOCUMENT.read_text(encoding="utf-8").split("## Features")[0]
    blocks = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    exec("\n".join(blocks), {})
    assert blocks and len(list(Path("written").rglob("*"))) >= 5
