"""What disks, transfers and strangers do to slides, and what a run makes of it: right, or a clear error; nothing else."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import tifffile

from hf_pathology.errors import SlideError, UserError
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cohort import CohortSlide, find_slides
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tiling import GridOptions, grid_path, tile_cohort


OPTIONS = GridOptions(mpp=0.5, tile_size=64)
SHADE = 16  # of 255, the mean difference below which a changed tile may go unnoticed (see test_integrity.py)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "slide.svs"
    write_aperio(path, draw_slide(1, "glandular", 768)[0], 0.5, quality=80, tile=128)
    return path


def mutate(content: bytes, rng: np.random.Generator, stored: np.ndarray) -> bytes:
    """The file with one of the usual kinds of damage; `stored` are the places of stored pixels."""
    damaged = bytearray(content)
    elsewhere = np.setdiff1d(np.arange(len(content)), stored)
    kind = rng.integers(4)
    if kind == 0:
        damaged[rng.choice(stored)] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        damaged[rng.choice(elsewhere)] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        return content[: int(rng.integers(len(content)))]
    else:
        start = int(rng.integers(len(content) - 512))
        damaged[start : start + 512] = bytes(512)
    return bytes(damaged)


@pytest.mark.parametrize("count", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_slides_are_read_rightly_or_refused_by_name(whole, tmp_path, count):
    with tifffile.TiffFile(whole) as tiff:
        page = tiff.pages[0]
        stored = np.concatenate([np.arange(o, o + n) for o, n in zip(page.dataoffsets, page.databytecounts)])
    content, rng = whole.read_bytes(), np.random.default_rng(count)
    for number in range(count):
        path = tmp_path / "slides" / f"{number:03d}.svs"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mutate(content, rng, stored))
    ((_, right),) = tile_cohort(find_slides(whole), tmp_path / "right", OPTIONS)
    tile_of = dict(zip(map(tuple, right.xy.tolist()), right.open(whole).read_tiles(right.xy, 64, right.extent)[0]))
    outcomes = Counter()
    options = GridOptions(mpp=0.5, tile_size=64, verify=True)
    for slide, grid in tile_cohort(find_slides(tmp_path / "slides"), tmp_path / "tiles", options):
        if isinstance(grid, SlideError):
            assert slide.path.name in str(grid)
            outcomes["refused"] += 1
            continue
        tiles, valid = grid.open(slide.path).read_tiles(grid.xy, 64, grid.extent)
        known = [tuple(corner) in tile_of for corner in grid.xy.tolist()]
        differences = [
            np.abs(tile.astype(int) - tile_of[tuple(corner)]).mean()
            for tile, corner, good, same_place in zip(tiles, grid.xy.tolist(), valid, known)
            if good and same_place
        ]
        assert max(differences) < SHADE
        outcomes["right" if max(differences) == 0 else "a shade"] += 1
    assert sum(outcomes.values()) == count and outcomes["right"] and outcomes["refused"]


NAMES = [
    "<b>&amp;.svs",
    "two\nlines.svs",
    "-rf.svs",
    "ü 漢字 ☃.svs",
    "'; drop \".svs",
    "..svs",
    "a/../b .svs",
    "%s{0}.svs",
]


def test_hostile_names_are_only_names(whole, tmp_path):
    slides = tmp_path / "slides"
    for number, name in enumerate(NAMES):
        path = slides / str(number) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole.read_bytes())
    found = find_slides(slides)
    out = tmp_path / "out"
    results = list(tile_cohort(found, out, OPTIONS))
    assert all(isinstance(grid, TileGrid) for _, grid in results) and len(results) == len(found) >= len(NAMES) - 1
    assert all(grid_path(out, slide.key).is_file() for slide, _ in results)
    assert {path.name for path in tmp_path.iterdir()} == {"slides", "out"}


def test_a_name_that_is_too_long_fails_its_slide_alone(whole, tmp_path):
    (tmp_path / "slides").mkdir()
    for name in ("a" * 245 + ".svs", "fine.svs"):
        (tmp_path / "slides" / name).write_bytes(whole.read_bytes())
    results = dict(tile_cohort(find_slides(tmp_path / "slides"), tmp_path / "out", OPTIONS))
    kinds = {slide.path.name[:4]: type(result) for slide, result in results.items()}
    assert kinds == {"aaaa": SlideError, "fine": TileGrid}


def test_slides_of_one_name_in_different_folders_do_not_collide(whole, tmp_path):
    for folder, seed in (("a", 1), ("b", 2)):
        path = tmp_path / "slides" / folder / "slide.svs"
        path.parent.mkdir(parents=True)
        write_aperio(path, draw_slide(seed, "glandular", 512)[0], 0.5)
    grids = [grid for _, grid in tile_cohort(find_slides(tmp_path / "slides"), tmp_path / "out", OPTIONS)]
    assert not np.array_equal(grids[0].xy, grids[1].xy)
    saved = [TileGrid.load(grid_path(tmp_path / "out", grid.slide)) for grid in grids]
    assert [np.array_equal(one.xy, other.xy) for one, other in zip(saved, grids)] == [True, True]


@pytest.mark.parametrize("claim", [(2**31 - 1, 2**31 - 1), (900_000, 900_000), (3_000_000, 4096), (2**32 - 1, 1)])
def test_absurd_dimensions_are_refused_at_once(tmp_path, claim):
    path = tmp_path / "absurd.tif"
    image = np.full((256, 256, 3), 200, np.uint8)
    options = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER", "photometric": "rgb"}
    tifffile.imwrite(path, image, tile=(256, 256), compression="jpeg", metadata=None, **options)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for tag, value in zip(("ImageWidth", "ImageLength"), claim):
            tiff.pages[0].tags[tag].overwrite(value, dtype="I")
    started = time.monotonic()
    ((_, result),) = tile_cohort(find_slides(path), tmp_path / "out", OPTIONS)
    assert isinstance(result, SlideError) and "absurd.tif" in str(result)
    assert time.monotonic() - started < 5


def test_a_slide_that_vanishes_before_it_is_tiled_is_named_and_the_others_go_on(whole, tmp_path):
    gone = CohortSlide("gone.svs", tmp_path / "gone.svs", "gone")
    results = [result for _, result in tile_cohort([gone, *find_slides(whole)], tmp_path / "out", OPTIONS)]
    assert isinstance(results[0], SlideError) and "gone.svs does not exist" in str(results[0])
    assert isinstance(results[1], TileGrid)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_folder_that_cannot_be_written_to_ends_the_run_in_one_line(whole, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        list(tile_cohort(find_slides(whole), tmp_path / "out", OPTIONS))
    tmp_path.chmod(0o700)


def test_a_file_in_the_place_of_a_folder_ends_the_run_in_one_line(whole, tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        list(tile_cohort(find_slides(whole), tmp_path / "out", OPTIONS))


TILE = """
import sys
from hf_pathology.slides.cohort import find_slides
from hf_pathology.slides.tiling import GridOptions, tile_cohort
for slide, grid in tile_cohort(find_slides(sys.argv[1]), sys.argv[2], GridOptions(mpp=0.5, tile_size=64)):
    print(slide.key, flush=True)
"""


@pytest.fixture(scope="module")
def many(whole, tmp_path_factory):
    """A folder of 24 slides."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(24):
        os.link(whole, folder / f"{number:02d}.svs")
    return folder


def tiling(slides, out, **options):
    return subprocess.Popen([sys.executable, "-c", TILE, str(slides), str(out)], stdout=subprocess.PIPE, **options)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_tiling_that_is_killed_again_and_again_ends_with_the_same_files(many, tmp_path, kills):
    list(tile_cohort(find_slides(many), tmp_path / "undisturbed", OPTIONS))
    rng, killed = np.random.default_rng(0), 0
    out = tmp_path / "killed"
    while killed < kills:
        process = tiling(many, out)
        time.sleep(rng.uniform(0.3, 1.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # it was done already: begin again with fewer files
            for path in list(out.rglob("*.safetensors"))[::2]:
                path.unlink()
        else:
            killed += 1
    done, _ = tiling(many, out).communicate(timeout=120)
    assert len(done.split()) == 24
    left = {path: content for path, content in files_of(out).items() if not path.name.endswith(".partial")}
    assert left == files_of(tmp_path / "undisturbed")
    assert not (out / ".claims").exists()


def test_two_processes_share_a_cohort_and_both_report_all_of_it(many, tmp_path):
    processes = [tiling(many, tmp_path / "out", text=True) for _ in range(2)]
    reports = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [sorted(report) for report in reports] == [sorted(slide.key for slide in find_slides(many))] * 2
