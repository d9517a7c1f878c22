import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import tifffile
from damage import spoil_tiles
from datasets import load_dataset
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from loopback_hub import hub_environment, loopback_hub
from PIL import Image

from hf_pathology.errors import SlideError, UserError
from hf_pathology.hub_upload.cards.dataset_cards import tiles_card
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cohort import CohortSlide
from hf_pathology.slides.grid import tile_grid
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.tissue import Tissue
from hf_pathology.tiles.filters import FilterOptions, tile_filter
from hf_pathology.tiles.jpeg_tiles import jpeg_tiles
from hf_pathology.tiles.loader import TileLoader
from hf_pathology.tiles.shard_formats import FEATURES, GROUP_TILES
from hf_pathology.tiles.shard_manifest import Manifest
from hf_pathology.tiles.shards import ShardBlocks
from hf_pathology.tiles.write_shards import write_shards


FORMATS = ("parquet", "webdataset")
LEVEL_0 = "Aperio Image Library v12.0.15 \r\n{0}x{1} [0,0 {0}x{1}] (64x64) JPEG/RGB Q=90|AppMag = 20|MPP = 0.5000"


def pairs_of(cohort):
    return [
        (CohortSlide(grid.slide, path, f"case_{i}", "ab"[i % 2]), grid) for i, (grid, path) in enumerate(zip(*cohort))
    ]


def noise(seed, width, height):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)


def grid_of(path, size=64, mpp=0.5):
    slide = Slide(path)
    width, height = slide.dimensions
    everywhere = Tissue(np.ones((8, 8), bool), (width / 8, height / 8))
    return tile_grid(slide, everywhere, key=path.name, size=size, mpp=mpp)


def native_pair(path):
    """A slide whose stored tiles are its tiles."""
    write_aperio(path, noise(0, 512, 512), 0.5, tile=64, quality=90, downsamples=(1,))
    return CohortSlide(path.name, path, "p"), grid_of(path)


def rows_of(files):
    """All samples of the shards by slide and corner, as the formats' own libraries read them."""
    rows = []
    for file in files:
        if file.suffix == ".parquet":
            rows += pq.read_table(file).to_pylist()
            continue
        with tarfile.open(file) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in members:
            if name.endswith(".jpg"):
                rows.append({**json.loads(members[name[:-4] + ".json"]), "image": {"bytes": members[name]}})
    return {(row["slide"], row["x"], row["y"]): row for row in rows}


def loader(source, **changes):
    options = {"batch_size": 8, "window": 1, "seed": 0, "workers": 0, **changes}
    return TileLoader(source, lambda row: {"pixels": row["tile"]}, **options)


def names(batches):
    return [(slide, *xy) for batch in batches for slide, xy in zip(batch["slide"], batch["xy"].tolist())]


def take(stream, count):
    return list(islice(iter(stream), count))


@pytest.fixture(scope="module", params=FORMATS)
def shards(request, cohort, tmp_path_factory):
    """The cohort in several shards, as (folder, files)."""
    folder = tmp_path_factory.mktemp("shards")
    return folder, write_shards(pairs_of(cohort), folder, format=request.param, shard_bytes=50_000, threads=2)


def test_every_tile_is_in_one_shard_with_all_that_is_known_of_it(shards, cohort):
    rows = rows_of(shards[1])
    assert len(shards[1]) == 2
    assert len(rows) == sum(map(len, cohort[0])) == ShardBlocks(shards[0]).tiles
    for slide, grid in pairs_of(cohort):
        for (x, y), share in zip(grid.xy.tolist(), grid.tissue_fraction.tolist()):
            row = rows[slide.key, x, y]
            assert (row["case"], row["label"], row["size"]) == (slide.case, slide.label, 64)
            assert (row["mpp"], row["mpp_asked"], row["tissue_fraction"]) == (0.5, 0.5, share)


def test_pixels_belong_to_their_names(shards, cohort):
    source = ShardBlocks(shards[0])
    rows = source.read(range(len(source)))
    assert (source.size, source.mpp) == (64, [0.5]) and rows.xy.dtype == np.int64
    slides = {grid.slide: (grid, Slide(path)) for grid, path in zip(*cohort)}
    for tile, key, xy in zip(rows.tiles, rows.slides, rows.xy):
        grid, slide = slides[key]
        original, _ = slide.read_tiles(xy[None], 64, grid.extent)
        assert np.abs(tile.astype(int) - original[0]).mean() < 2


def test_a_row_group_mixes_the_slides_and_in_order_it_does_not(shards, cohort, tmp_path):
    source = ShardBlocks(shards[0])
    assert all(len(set(source.read([number]).slides)) == 3 for number in range(len(source) - 1))
    write_shards(pairs_of(cohort), tmp_path, keep_order=True)
    first = ShardBlocks(tmp_path).read([0]).slides
    assert set(first) == {cohort[0][0].slide} and len(first) == GROUP_TILES


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(shards, cohort, tmp_path):
    format = Manifest.load(shards[0]).asked["format"]
    again = write_shards(pairs_of(cohort), tmp_path / "a", format=format, shard_bytes=50_000, threads=1)
    other = write_shards(pairs_of(cohort), tmp_path / "b", format=format, shard_bytes=50_000, seed=1)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards[1]]
    assert other[0].read_bytes() != again[0].read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_gives_exactly_the_tiles_that_would_have_followed(shards, workers):
    straight = names(take(loader(ShardBlocks(shards[0]), workers=workers), 30))
    first = loader(ShardBlocks(shards[0]), workers=workers)
    begun = names(take(first, 13))
    second = loader(ShardBlocks(shards[0]), workers=workers)
    second.load_state_dict([json.loads(json.dumps(first.state_dict()))])
    assert begun + names(take(second, 17)) == straight


def test_an_epoch_holds_every_tile_once_over_all_ranks(shards, cohort):
    source = ShardBlocks(shards[0])
    places = []
    for rank in range(2):
        stream, seen = loader(source, rank=rank, world=2, batch_size=1), []
        for batch in stream:
            if stream.state_dict()["places"][0][0] >= len(source):  # the next epoch has begun
                break
            seen += names([batch])
        places.append(seen)
    everything = sorted((grid.slide, *xy) for grid in cohort[0] for xy in grid.xy.tolist())
    assert all(places) and sorted(places[0] + places[1]) == everything


def test_tiles_that_a_filter_drops_are_left_out(shards):
    source = ShardBlocks(shards[0], tile_filter=tile_filter(FilterOptions(min_brightness=150)))
    kept = [tile for tile in source.read(range(len(source))).tiles if tile is not None]
    assert 0 < len(kept) < source.tiles and all(tile.max(axis=2).mean() >= 150 for tile in kept)


@pytest.mark.parametrize("dialect", ["ycbcr", "rgb"])
def test_tiles_that_are_stored_tiles_keep_their_stream_and_show_what_openslide_shows(tmp_path, dialect):
    path, picture = tmp_path / "native.svs", noise(1, 256, 192)
    if dialect == "ycbcr":
        write_aperio(path, picture, 0.5, tile=64, quality=90, downsamples=(1,))
    else:
        codec = {"compression": "jpeg", "compressionargs": {"level": 90, "outcolorspace": "rgb"}, "photometric": "rgb"}
        description = LEVEL_0.format(256, 192)
        tifffile.imwrite(path, picture, tile=(64, 64), description=description, metadata=None, software=False, **codec)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].photometric.name.lower() == dialect
    grid, slide = grid_of(path), Slide(path)
    tiles = jpeg_tiles(slide, grid.xy, 64, grid.extent, quality=90)
    assert len(tiles) == 12
    for (x, y), tile in zip(grid.xy.tolist(), tiles):
        expected = np.asarray(slide.handle.read_region((x, y), 0, (64, 64)))[..., :3]
        assert tile.passed
        assert (simplejpeg.decode_jpeg(tile.stream, "RGB") == expected).all()
        assert (np.asarray(Image.open(io.BytesIO(tile.stream)).convert("RGB")) == expected).all()


def test_only_whole_stored_tiles_are_passed_on(tmp_path):
    path = tmp_path / "slide.svs"
    write_aperio(path, noise(2, 300, 300), 0.5, tile=64, quality=90, downsamples=(1,))
    slide = Slide(path)

    def passed(xy, size=64, extent=(64.0, 64.0), opened=slide):
        (tile,) = jpeg_tiles(opened, np.array([xy]), size, extent, quality=90)
        return tile.passed

    assert passed((64, 128))
    assert not passed((65, 128))  # beside the lattice
    assert not passed((256, 128))  # leaves the slide
    assert not passed((-64, 0))
    assert not passed((64, 128), size=32)  # another resolution
    assert not passed((0, 0), size=128, extent=(128.0, 128.0))  # several stored tiles
    assert not passed((64, 128), opened=Slide(path, icc=True))


def test_encoded_tiles_keep_the_whole_resolution_of_colour(cohort, tmp_path):
    files = write_shards(pairs_of(cohort), tmp_path)
    stream = next(iter(rows_of(files).values()))["image"]["bytes"]
    assert simplejpeg.decode_jpeg_header(stream)[3] == "444"


@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_stored_tile_is_passed_on_only_when_nobody_looks(tmp_path, verify):
    slide, grid = native_pair(tmp_path / "slide.svs")
    with tifffile.TiffFile(slide.path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
    stamp = slide.path.stat().st_mtime_ns
    with open(slide.path, "r+b") as file:  # the second half of its pixels
        file.seek(offset + count // 2)
        file.write(b"\xff\xd9" * (count // 4))
    os.utime(slide.path, ns=(stamp, stamp))
    files = write_shards([(slide, grid)], tmp_path / "out", verify=verify)
    manifest = Manifest.load(tmp_path / "out")
    assert len(rows_of(files)) == manifest.tiles == manifest.passed == 64 - verify
    assert manifest.unreadable == ({"slide.svs": 1} if verify else {})


def test_unreadable_tiles_are_counted_and_a_slide_that_lost_more_than_a_hundredth_is_named(tmp_path):
    damaged = native_pair(tmp_path / "damaged.svs")
    fine = native_pair(tmp_path / "fine.svs")
    stamp = damaged[0].path.stat().st_mtime_ns
    spoil_tiles(damaged[0].path, 3, 4)
    os.utime(damaged[0].path, ns=(stamp, stamp))
    files = write_shards([damaged, fine], tmp_path / "out")
    manifest = Manifest.load(tmp_path / "out")
    assert len(rows_of(files)) == manifest.tiles == 126
    (message,) = manifest.damaged_slides([damaged[1], fine[1]])
    assert message.startswith("damaged.svs: 2 of 64 tiles could not be read")


def test_a_slide_that_changed_since_it_was_tiled_stops_the_writing_by_name(tmp_path):
    slide, grid = native_pair(tmp_path / "slide.svs")
    os.utime(slide.path, ns=(0, 0))
    with pytest.raises(SlideError, match=r"slide\.svs has changed since it was tiled"):
        write_shards([(slide, grid)], tmp_path / "out")


def test_names_of_slides_reach_no_name_of_a_file(cohort, tmp_path):
    (slide, grid), *_ = pairs_of(cohort)
    hostile = CohortSlide("../../etc/<x>\n.svs", slide.path, "case")
    (file,) = write_shards([(hostile, grid)], tmp_path, format="webdataset")
    with tarfile.open(file) as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == ["tiles-00000-000000.jpg", "tiles-00000-000000.json"]
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
    assert ShardBlocks(file).read([0]).slides[0] == hostile.key


# Resuming what was interrupted.


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


KILLED = """
import sys, time
import numpy as np
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiles.test_shards import grid_of
from hf_pathology.slides.cohort import CohortSlide
from hf_pathology.tiles.write_shards import write_shards
paths = sorted(Path({slides!r}).glob("*.svs"))
pairs = [(CohortSlide(path.name, path, path.name), grid_of(path)) for path in paths]
slow = (lambda tiles: time.sleep(0.02)) if {slow!r} else None
write_shards(pairs, {out!r}, format={format!r}, shard_bytes=20_000, threads=1, progress=slow)
"""


@pytest.mark.parametrize("format", ["parquet", pytest.param("webdataset", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_and_run_again_gives_the_bytes_of_one_that_was_not(cohort, tmp_path, format):
    slides = cohort[1][0].parent

    def program(out, slow):
        tests = str(Path(__file__).resolve().parents[1])
        code = KILLED.format(tests=tests, slides=str(slides), out=str(tmp_path / out), slow=slow, format=format)
        return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert program("undisturbed", slow=False).wait() == 0
    running = program("killed", slow=True)
    while not (tmp_path / "killed" / "data" / f"tiles-00001.{'parquet' if format == 'parquet' else 'tar'}").exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert contents(tmp_path / "killed") != contents(tmp_path / "undisturbed")
    assert program("killed", slow=False).wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_a_finished_shard_is_found_and_a_damaged_one_made_again(cohort, tmp_path):
    files = write_shards(pairs_of(cohort), tmp_path, shard_bytes=20_000)
    before = contents(tmp_path)
    stamps = [path.stat().st_mtime_ns for path in files]
    spoilt = bytearray(files[1].read_bytes())
    spoilt[1000] ^= 1
    files[1].write_bytes(spoilt)
    assert write_shards(pairs_of(cohort), tmp_path, shard_bytes=20_000) == files
    assert contents(tmp_path) == before
    assert [path.stat().st_mtime_ns for path in files if path != files[1]] == [stamps[0], *stamps[2:]]


def test_shards_of_something_else_are_not_written_over(cohort, tmp_path):
    write_shards(pairs_of(cohort), tmp_path / "a")
    with pytest.raises(UserError, match="made with other quality: choose another --out"):
        write_shards(pairs_of(cohort), tmp_path / "a", quality=80)
    with pytest.raises(UserError, match="made with other tiles: choose another --out"):
        write_shards(pairs_of(cohort)[:2], tmp_path / "a")
    (tmp_path / "b" / "data").mkdir(parents=True)
    (tmp_path / "b" / "data" / "mine.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"no shards\.json lists"):
        write_shards(pairs_of(cohort), tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"format": "zip"}, "format is zip"), ({"quality": 0}, "quality is 0"), ({"shard_bytes": 0}, "shard_bytes is 0")],
)
def test_options_that_make_no_sense_are_refused(cohort, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        write_shards(pairs_of(cohort), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# What other libraries make of the shards.


def decoded(image):
    return np.asarray(image.convert("RGB"))


def test_datasets_loads_the_parquet_with_pictures_at_once_and_streaming(cohort, tmp_path):
    files = write_shards(pairs_of(cohort), tmp_path / "out", shard_bytes=50_000)
    rows = rows_of(files)
    options = {"data_dir": str(tmp_path / "out" / "data"), "split": "train"}
    whole = load_dataset("parquet", cache_dir=str(tmp_path / "cache"), **options)
    assert whole.num_rows == len(rows)
    streamed = load_dataset("parquet", streaming=True, **options)
    for found in (whole[0], *islice(streamed, 3)):
        stream = rows[found["slide"], found["x"], found["y"]]["image"]["bytes"]
        assert (decoded(found["image"]) == simplejpeg.decode_jpeg(stream, "RGB")).all()


def test_datasets_streams_the_webdataset(cohort, tmp_path):
    rows = rows_of(files := write_shards(pairs_of(cohort), tmp_path / "out", format="webdataset", shard_bytes=50_000))
    streamed = load_dataset("webdataset", data_files=list(map(str, files)), split="train", streaming=True)
    seen = list(streamed)
    assert len(seen) == len(rows)
    for found in seen[:3]:
        facts = found["json"]
        stream = rows[facts["slide"], facts["x"], facts["y"]]["image"]["bytes"]
        assert (decoded(found["jpg"]) == simplejpeg.decode_jpeg(stream, "RGB")).all()


# Other places than the disk.


@pytest.mark.parametrize("shards", FORMATS, indirect=True)
def test_shards_in_another_file_system_give_the_same_stream(shards, request):
    files, folder = MemoryFileSystem(), f"/{request.node.callspec.id}"
    for path in shards[1]:
        files.pipe_file(f"{folder}/data/{path.name}", path.read_bytes())
    there, here = ShardBlocks(folder, files=files), ShardBlocks(shards[0])
    assert there.fingerprint == here.fingerprint
    assert names(take(loader(there), 20)) == names(take(loader(here), 20))
    assert names(take(loader(there, workers=2), 5)) == names(take(loader(here, workers=2), 5))


class RangeFiles(AbstractFileSystem):
    """Files that are fetched range by range, as from the Hub; it remembers which."""

    protocol, cachable = "ranges", False

    def __init__(self, content):
        super().__init__()
        self.content, self.fetched = content, []

    def find(self, path, **options):
        return sorted(self.content)

    def info(self, path, **options):
        if path not in self.content:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.content[path]), "type": "file"}

    def _open(self, path, mode="rb", **options):
        return RangeFile(self, path, mode, **options)


class RangeFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        self.fs.fetched.append((self.path, end - start))
        return self.fs.content[self.path][start:end]


def test_only_the_blocks_that_are_asked_for_are_fetched(shards):
    folder = shards[0]
    content = {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}  # with the index of a tar
    files = RangeFiles(content)
    source = ShardBlocks("anywhere", files=files)
    source.read([1])  # opens the first shard, which has two of the three blocks
    files.fetched.clear()
    assert len(source) == 3 and len(source.read([0]).tiles) > 50
    ((name, size),) = files.fetched  # one request
    assert name == shards[1][0].name and size < 0.7 * len(content[name])


STREAM_FROM_HUB = """
import json
from datasets import load_dataset
from tiles.test_shards import loader, names, take
from hf_pathology.tiles.shards import ShardBlocks
source = ShardBlocks("hf://datasets/me/tiles")
row = next(iter(load_dataset("me/tiles", split="train", streaming=True)))
print(json.dumps([names(take(loader(source, workers=workers), 10)) for workers in (0, 2)] + [sorted(row)]))
"""


def test_shards_stream_from_the_hub_and_datasets_finds_them_by_the_card(cohort, tmp_path):
    shards = write_shards(pairs_of(cohort), tmp_path / "out", shard_bytes=50_000)
    with loopback_hub() as hub:
        files = {f"data/{path.name}": path.read_bytes() for path in shards}
        files["README.md"] = tiles_card(pairs=pairs_of(cohort), manifest=Manifest.load(tmp_path / "out")).encode()
        hub.create("datasets", "me/tiles", files)
        environment = hub_environment(os.environ, hub, tmp_path / "home", token=None)
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
        command = [sys.executable, "-c", STREAM_FROM_HUB]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    alone, two, columns = json.loads(ran.stdout)
    for workers, there in ((0, alone), (2, two)):
        here = names(take(loader(ShardBlocks(tmp_path / "out"), workers=workers), 10))
        assert [tuple(name) for name in there] == here
    assert columns == sorted(FEATURES)


def test_a_dataset_that_is_not_on_the_hub_is_refused_in_one_line(tmp_path):
    code = "from hf_pathology.tiles.shards import ShardBlocks\nfrom hf_pathology.errors import UserError\n"
    code += "try:\n    ShardBlocks('hf://datasets/me/none')\nexcept UserError as error:\n    print(error)"
    with loopback_hub() as hub:
        environment = hub_environment(os.environ, hub, tmp_path, token=None)
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("hf://datasets/me/none ") and len(ran.stdout.splitlines()) == 1


# Bad shards.


def parquet_of(path, **columns):
    tile = simplejpeg.encode_jpeg(np.full((64, 64, 3), 99, np.uint8), 90)
    rows = {"image": [{"bytes": tile, "path": None}] * 3, "slide": ["s"] * 3, "x": [0, 64, 128], "y": [0] * 3}
    rows |= {"size": [64] * 3, "mpp_asked": [0.5] * len(columns.get("size") or range(3)), **columns}
    table = pa.table({name: column for name, column in rows.items() if column})
    pq.write_table(table, path)
    return path


def test_images_that_are_damaged_or_claim_too_much_are_left_out(tmp_path):
    good = simplejpeg.encode_jpeg(noise(0, 64, 64), 90)
    bomb = bytearray(good)
    frame = good.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # height and width
    streams = [
        bytes(bomb),
        good[: len(good) // 2],
        None,
        b"",
        b"no JPEG",
        simplejpeg.encode_jpeg(noise(0, 32, 32)),
        good,
    ]
    columns = {"slide": ["s"] * 7, "x": range(7), "y": range(7), "size": [64] * 7}
    parquet_of(tmp_path / "a.parquet", image=[{"bytes": each, "path": None} for each in streams], **columns)
    tiles = ShardBlocks(tmp_path).read([0]).tiles
    assert [tile is not None for tile in tiles] == [False] * 6 + [True]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": None}, r"a\.parquet has no column image \(it has slide, x, y, size, mpp_asked\)"),
        ({"size": None}, r"a\.parquet has no column size"),
        ({"image": ["text"] * 3}, r"column image is string, and not \{bytes, path\}"),
        ({"size": [10**6] * 3}, r"a\.parquet claims tiles of 1000000 px"),
    ],
)
def test_parquet_of_something_else_is_refused_in_one_line(tmp_path, columns, message):
    parquet_of(tmp_path / "a.parquet", **columns)
    with pytest.raises(UserError, match=message) as refused:
        ShardBlocks(tmp_path)
    assert "\n" not in str(refused.value)


def test_row_groups_too_large_to_be_decoded_at_once_are_refused(tmp_path):
    many = 2000
    columns = {"slide": ["s"] * many, "x": range(many), "y": [0] * many, "size": [64] * many}
    parquet_of(tmp_path / "a.parquet", image=[{"bytes": b"", "path": None}] * many, **columns)
    with pytest.raises(UserError, match="row groups of 2,000 tiles"):
        ShardBlocks(tmp_path)


def test_shards_of_different_sizes_are_refused(tmp_path):
    parquet_of(tmp_path / "a.parquet")
    parquet_of(tmp_path / "b.parquet", size=[32] * 3)
    with pytest.raises(UserError, match=r"a\.parquet has tiles of 64 px and .*b\.parquet of 32 px"):
        ShardBlocks(tmp_path)


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no shard"):
        ShardBlocks(tmp_path)
    with pytest.raises(UserError, match="nowhere holds no shard"):
        ShardBlocks(tmp_path / "nowhere")


@pytest.mark.parametrize("cut", [0, 10, 5000, -1, -600])
def test_a_truncated_shard_is_refused_in_one_line(shards, tmp_path, cut):
    path = tmp_path / shards[1][0].name
    path.write_bytes(shards[1][0].read_bytes()[:cut])
    if path.suffix == ".tar" and cut in (-1, -600):  # of the zeros that fill it up
        assert ShardBlocks(tmp_path).tiles
        return
    with pytest.raises(UserError, match=r"cannot be read as .*: it is damaged or incomplete; get it again") as refused:
        ShardBlocks(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_index_of_a_tar_is_found_again_and_made_anew_when_stale_or_damaged(cohort, tmp_path):
    first, second, *_ = write_shards(pairs_of(cohort), tmp_path / "out", format="webdataset", shard_bytes=50_000)
    tar = tmp_path / "some.tar"
    tar.write_bytes(first.read_bytes())
    index = Path(f"{tar}.index")
    expected = ShardBlocks(tar).read([0]).xy.tolist()
    saved = index.read_text()
    ShardBlocks(tar)
    assert index.read_text() == saved

    index.write_text(saved.replace("[0, ", "[512, "))
    assert ShardBlocks(tar).read([0]).xy.tolist() == expected and index.read_text() == saved
    index.write_text("")
    assert ShardBlocks(tar).read([0]).xy.tolist() == expected and index.read_text() == saved

    later = index.stat().st_mtime + 10
    tar.write_bytes(second.read_bytes())
    os.utime(tar, (later, later))
    assert ShardBlocks(tar).read([0]).xy.tolist() == ShardBlocks(second).read([0]).xy.tolist()


def test_a_folder_that_cannot_be_written_to_is_streamed_all_the_same(cohort, tmp_path):
    (tar,) = write_shards(pairs_of(cohort), tmp_path, format="webdataset")
    Path(f"{tar}.index").unlink()
    Path(f"{tar}.index").mkdir()  # nothing can be put in its place
    (Path(f"{tar}.index") / "full").touch()
    assert ShardBlocks(tar).tiles == sum(map(len, cohort[0]))


def test_a_tar_without_facts_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("0.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(UserError, match=r"no sample has a \.json with slide, x, y, size and mpp_asked"):
        ShardBlocks(tmp_path)
