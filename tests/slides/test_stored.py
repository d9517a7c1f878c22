import json
import os
import shutil
import threading

import cv2
import numpy as np
import pytest
import tifffile
from PIL import ImageCms
from slides import DIALECTS, write_slide

from hf_pathology.errors import SlideError
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cutting import resample
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.stored import SlideLayout
from hf_pathology.slides.synthetic import draw_slide


DIRECT = ["aperio-240-420", "aperio-256-420", "aperio-256-422", "aperio-256-rgb", "generic-512-420"]
BY_OPENSLIDE = ["aperio-j2k-rgb", "aperio-j2k-ycbcr", "generic-lzw", "generic-deflate"]


@pytest.fixture(scope="session")
def slide_of(tmp_path_factory):
    """A function from the name of a dialect to a slide of 1100 x 900 pixels in it."""
    folder = tmp_path_factory.mktemp("dialects")
    image = np.ascontiguousarray(draw_slide(5, "glandular", 1152)[0][:900, :1100])

    def written(name):
        path = folder / f"{name}{DIALECTS[name].suffix}"
        if not path.exists():
            write_slide(path, DIALECTS[name], image)
        return path

    return written


def by_openslide(slide, xy, level, size):
    return np.asarray(slide.handle.read_region(xy, level, size).convert("RGB"))


@pytest.mark.parametrize("dialect", DIRECT)
def test_directly_decoded_tiles_have_the_pixels_of_openslide(slide_of, dialect):
    slide = Slide(slide_of(dialect))
    assert slide.layout.stored[0] is not None
    xy = np.array([[0, 0], [37, 53], [37 + 200, 53], [511, 300], [880, 690]])
    tiles, valid = slide.read_tiles(xy, 200, (200.0, 200.0))
    assert valid.all()
    for corner, tile in zip(xy.tolist(), tiles):
        assert np.array_equal(tile, by_openslide(slide, corner, 0, (200, 200)))


@pytest.mark.parametrize("dialect", BY_OPENSLIDE)
def test_what_is_not_stored_as_jpeg_is_read_by_openslide_in_blocks_with_the_same_pixels(slide_of, dialect):
    slide = Slide(slide_of(dialect))
    assert slide.layout.stored == (None,) * len(slide.layout.level_sizes)
    xy = np.array([[x, y] for y in (13, 113, 213) for x in (7, 107, 207)])
    tiles, valid = slide.read_tiles(xy, 100, (100.0, 100.0))
    assert valid.all()
    for corner, tile in zip(xy.tolist(), tiles):
        assert np.array_equal(tile, by_openslide(slide, corner, 0, (100, 100)))


@pytest.mark.parametrize("dialect", DIRECT)
def test_a_lower_level_is_decoded_directly_too(slide_of, dialect):
    slide = Slide(slide_of(dialect))
    tile = slide.read((400, 400), (64, 64), 1.0)
    assert np.array_equal(tile, by_openslide(slide, (400, 400), 1, (64, 64)))


def test_a_tile_that_is_a_stored_tile_is_decoded_straight_into_its_place(slide_of):
    slide = Slide(slide_of("aperio-256-420"))
    out = np.zeros((2, 256, 256, 3), np.uint8)
    xy = np.array([[256, 256], [512, 0]])
    tiles, valid = slide.read_tiles(xy, 256, (256.0, 256.0), out)
    assert tiles is out and valid.all()
    for corner, tile in zip(xy.tolist(), out):
        assert np.array_equal(tile, by_openslide(slide, corner, 0, (256, 256)))


@pytest.mark.parametrize("factor", [2, 3])
def test_a_coarser_pixel_is_the_mean_of_the_light_on_its_area(slide_of, factor):
    slide = Slide(slide_of("aperio-256-rgb"))
    size = 96
    tile = slide.read((40, 60), (size, size), 0.25 * factor)
    stored = by_openslide(slide, (40, 60), 0, (size * factor, size * factor)).astype(float)
    means = stored.reshape(size, factor, size, factor, 3).mean(axis=(1, 3))
    assert np.abs(tile - means).max() <= 0.5 + 1e-9


def test_resampling_by_a_fraction_is_the_exact_area_mean():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (70, 55, 3)).astype(np.uint8)
    out = np.empty((40, 40, 3), np.uint8)
    resample(pixels, out)

    def weights(wide, narrow):
        """Share of each source pixel in each output pixel, by their overlap."""
        edges = np.arange(narrow + 1) * wide / narrow
        low, high = edges[:-1, None], edges[1:, None]
        cells = np.arange(wide)
        return np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, None) * narrow / wide

    exact = np.einsum("yr,rcd,xc->yxd", weights(70, 40), pixels.astype(float), weights(55, 40))
    assert np.abs(out - exact).max() <= 0.51


@pytest.mark.parametrize(("dialect", "nearness"), [("generic-lzw", 0.6), ("aperio-256-420", 5)])  # JPEG loses twice
def test_pixels_do_not_depend_on_the_level_they_are_read_from(slide_of, dialect, nearness):
    slide = Slide(slide_of(dialect))
    xy, extent = np.array([[64, 128]]), (640.0, 640.0)
    from_level_1, _ = slide.read_tiles(xy, 160, extent)  # four times coarser: level 1 as it is
    fine = by_openslide(slide, (64, 128), 0, (640, 640))
    from_level_0 = cv2.resize(fine, (160, 160), interpolation=cv2.INTER_AREA)
    assert slide.level_for((4.0, 4.0)).number == 1
    assert np.abs(from_level_1[0].astype(int) - from_level_0).mean() < nearness


def test_half_scale_decoding_is_chosen_only_when_asked_for_and_is_near(slide_of):
    path = slide_of("aperio-256-420")
    exact = Slide(path).read((100, 100), (256, 256), 0.5)
    fast = Slide(path, half_scale=True).read((100, 100), (256, 256), 0.5)
    mean_square = ((exact.astype(float) - fast) ** 2).mean()
    assert 0 < mean_square < 255**2 / 10**3.5  # more than 35 dB


def test_tiles_over_any_edge_are_white_outside(slide_of):
    slide = Slide(slide_of("aperio-240-420"))
    tiles, valid = slide.read_tiles(np.array([[-50, -60], [1050, 850], [5000, 5000]]), 100, (100.0, 100.0))
    assert valid.all()
    assert (tiles[0, :60] == 255).all() and (tiles[0, :, :50] == 255).all()
    assert np.array_equal(tiles[0, 60:, 50:], by_openslide(slide, (0, 0), 0, (50, 40)))
    assert (tiles[1, 50:] == 255).all() and (tiles[2] == 255).all()


def test_a_layout_is_a_kilobyte_and_spares_openslide(slide_of):
    slide = Slide(slide_of("aperio-256-420"))
    stored = json.dumps(slide.layout.to_json())
    assert len(stored) < 8000
    again = Slide(slide.path, slide.mpp, layout=SlideLayout.from_json(json.loads(stored)))
    assert np.array_equal(again.read((30, 40), (128, 128), 0.5), slide.read((30, 40), (128, 128), 0.5))
    assert again._handle is None and again.dimensions == slide.dimensions


def test_a_file_that_was_exchanged_is_not_read_by_the_old_layout(slide_of, tmp_path):
    path = tmp_path / "slide.svs"
    shutil.copy(slide_of("aperio-256-420"), path)
    layout = Slide(path).layout
    shutil.copy(slide_of("aperio-240-420"), path)
    with pytest.raises(SlideError, match="slide.svs has changed since it was tiled: tile it again"):
        Slide(path, layout=layout).read_tiles(np.array([[0, 0]]), 64, (64.0, 64.0))


def test_a_stored_tile_that_claims_other_dimensions_is_refused_before_it_is_decoded(slide_of, tmp_path):
    path = tmp_path / "bomb.svs"
    shutil.copy(slide_of("aperio-256-420"), path)
    slide = Slide(path)
    _ = slide.layout
    level = slide.layout.stored[0]
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[6]
    stream = level.stored_bytes(slide.file, 6)
    frame = stream.index(b"\xff\xc0")
    with open(path, "r+b") as file:
        file.seek(offset + frame + 5)
        file.write(b"\xff\xff\xff\xff")  # height and width
    slide = Slide(path)
    row, column = divmod(6, level.columns)
    tiles, valid = slide.read_tiles(np.array([[column * 256, row * 256], [0, 0]]), 256, (256.0, 256.0))
    assert valid.tolist() == [False, True] and (tiles[0] == 0).all()


def test_a_level_with_missing_stored_tiles_is_left_to_openslide(tmp_path):
    path = tmp_path / "holes.tif"
    image = draw_slide(1, "glandular", 512)[0]
    dialect = DIALECTS["generic-lzw"]
    write_slide(path, DIALECTS["generic-512-420"], image)
    assert Slide(path).layout.stored[0] is not None
    with tifffile.TiffFile(path) as tiff:
        counts = tiff.pages[0].tags["TileByteCounts"]
        place = counts.valueoffset
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(bytes(4))
    assert Slide(path).layout.stored[0] is None and dialect.vendor == "generic-tiff"


def test_damaged_parts_of_an_overview_are_white_until_they_are_too_many(tmp_path):
    path = tmp_path / "slide.svs"
    write_aperio(path, np.full((2560, 2560, 3), 150, np.uint8), 0.5, tile=64, downsamples=(1,))
    with tifffile.TiffFile(path) as tiff:
        offsets = tiff.pages[0].dataoffsets
    for count, readable in ((8, True), (40, False)):
        with open(path, "r+b") as file:
            for offset in offsets[100 : 100 + count]:
                file.seek(offset)
                file.write(b"\0" * 32)
        if readable:
            overview, _ = Slide(path).overview(640)
            assert (overview == 255).all(axis=2).sum() == count * 16 * 16
        else:
            with pytest.raises(SlideError, match=r"slide.svs cannot be decoded over 2.5% of its area"):
                Slide(path).overview(640)


def test_a_large_single_level_is_overviewed_in_bands(slide_of, monkeypatch):
    slide = Slide(slide_of("aperio-256-420"))
    whole, extent = slide.overview(300)
    monkeypatch.setattr("hf_pathology.slides.reader.BAND_PIXELS", 20_000)
    banded, same_extent = Slide(slide.path).overview(300)
    assert same_extent == extent
    assert np.abs(whole.astype(int) - banded).mean() < 2


def test_threads_share_one_slide(slide_of):
    slide = Slide(slide_of("aperio-256-420"))
    xy = np.array([[x, y] for y in range(0, 800, 100) for x in range(0, 1000, 100)])
    expected, _ = slide.read_tiles(xy, 100, (100.0, 100.0))
    slide.close()
    results = [None] * 8

    def read(i):
        results[i] = slide.read_tiles(xy, 100, (100.0, 100.0))[0]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    before = len(os.listdir("/proc/self/fd"))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(result, expected) for result in results)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def with_red_and_green_exchanged():
    """An ICC profile like sRGB, but that its first channel is green and its second red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12)
    red, green = (
        next(place for place in entries if profile[place : place + 4] == name) for name in (b"rXYZ", b"gXYZ")
    )
    profile[red + 4 : red + 8], profile[green + 4 : green + 8] = (
        profile[green + 4 : green + 8],
        profile[red + 4 : red + 8],
    )
    return bytes(profile)


def test_colours_are_converted_by_the_profile_of_the_slide_when_asked_for(tmp_path):
    path = tmp_path / "profiled.tif"
    image = np.full((512, 512, 3), (200, 80, 120), np.uint8)
    options = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER", "photometric": "rgb"}
    tifffile.imwrite(
        path, image, tile=(256, 256), compression="lzw", iccprofile=with_red_and_green_exchanged(), **options
    )
    plain, converted = Slide(path), Slide(path, icc=True)
    assert plain.overview(64)[0][0, 0].tolist() == [200, 80, 120]
    assert np.abs(converted.overview(64)[0][0, 0].astype(int) - [80, 200, 120]).max() <= 2
    tiles, _ = converted.read_tiles(np.array([[10, 10]]), 100, (100.0, 100.0))
    assert np.abs(tiles[0].astype(int) - [80, 200, 120]).max() <= 2


def test_the_profile_of_a_real_dicom_slide_is_applied(real_data):
    path = real_data / "wsi" / "highdicom_sm_image.dcm"
    plain, converted = Slide(path), Slide(path, icc=True)
    assert plain.handle.color_profile is not None  # it is sRGB, so nothing may change
    assert np.array_equal(plain.overview(50)[0], converted.overview(50)[0])


def test_a_slide_without_profile_stays_as_it_is(slide_of):
    path = slide_of("aperio-256-420")
    assert np.array_equal(Slide(path, icc=True).overview(300)[0], Slide(path).overview(300)[0])
