"""Folders of images as a source of the stream: every image once an epoch, exact resume, and faults that are named."""

import json
import multiprocessing
import pickle
from itertools import islice

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_pathology.errors import UserError
from hf_pathology.tiles.filters import FilterOptions, tile_filter
from hf_pathology.tiles.folder import read_tile
from hf_pathology.tiles.folder_blocks import FolderBlocks
from hf_pathology.tiles.loader import TileLoader


SUFFIXES = (".png", ".jpg", ".tif", ".JPEG")
COUNT = 42


def draw(path, value=0, edge=16, **options):
    """A tile whose red channel is `value` all over; green and blue are noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(90, 110, (edge, edge, 3)).astype(np.uint8)
    pixels[..., 0] = value
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """42 tiles of 16 px at three depths, in four formats; the red channel is the tile's number times five."""
    folder = tmp_path_factory.mktemp("tiles")
    for i in range(COUNT):
        place = ("", "a/", "b/deep/")[i % 3]
        draw(folder / f"{place}{i:02}{SUFFIXES[i % 4]}", 5 * i, **({"quality": 100} if i % 4 in (1, 3) else {}))
    (folder / "notes.txt").write_text("no image")
    (folder / ".thumbnails").mkdir()
    draw(folder / ".thumbnails" / "00.png")
    return folder


def loader(source, **changes):
    options = {"batch_size": 5, "window": 3, "seed": 0, "workers": 0, **changes}
    return TileLoader(source, lambda row: {"red": row["tile"][..., 0].mean()}, **options)


def names(batches):
    return [slide for batch in batches for slide in batch["slide"]]


def take(stream, count):
    return list(islice(iter(stream), count))


@pytest.mark.parametrize("in_memory", [False, True])
def test_every_image_at_any_depth_is_in_one_block_with_its_own_pixels(folder, in_memory):
    source = FolderBlocks(folder, block=4, in_memory=in_memory)
    rows = source.read(range(len(source)))
    assert (source.size, source.tiles, len(source)) == (16, COUNT, 11)
    assert len(set(rows.slides)) == COUNT and not any(".thumbnails" in slide for slide in rows.slides)
    assert rows.xy.tolist() == [[0, 0]] * COUNT
    for tile, slide in zip(rows.tiles, rows.slides):
        assert tile.dtype == np.uint8
        np.testing.assert_array_equal(tile, read_tile(folder / slide))
        assert tile[..., 0].mean() == pytest.approx(5 * int(slide.split("/")[-1][:2]), abs=2)


def test_the_blocks_differ_in_size_by_one_at_most_and_take_their_images_from_everywhere(folder):
    source = FolderBlocks(folder, block=4)
    blocks = [source.read([number]).slides for number in range(len(source))]
    assert sorted({len(block) for block in blocks}) == [3, 4]
    assert blocks[0] == source.paths[::11]


def test_a_stream_of_a_folder_holds_every_image_once_an_epoch(folder):
    seen = names(take(loader(FolderBlocks(folder, block=4), batch_size=7), 2 * COUNT // 7))
    assert sorted(seen[:COUNT]) == sorted(seen[COUNT:]) == FolderBlocks(folder).paths
    assert seen[:COUNT] != seen[COUNT:]


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_of_a_folder_gives_exactly_the_tiles_that_would_have_followed(folder, workers, in_memory):
    source = FolderBlocks(folder, block=4, in_memory=in_memory)
    straight = take(loader(source, workers=workers), 30)
    first = loader(source, workers=workers)
    begun = names(take(first, 13))
    second = loader(FolderBlocks(folder, block=4), workers=workers)
    second.load_state_dict([json.loads(json.dumps(first.state_dict()))])
    following = take(second, 17)
    assert begun + names(following) == names(straight)
    assert [batch["red"].tolist() for batch in following] == [batch["red"].tolist() for batch in straight[13:]]


def test_a_manifest_chooses_the_images_and_its_splits_restrict_them(folder, tmp_path):
    for i in range(6):
        draw(tmp_path / f"{i}.png", i)
    rows = [(f"{5 - i}.png", ("train", "val", "test")[i % 3]) for i in range(5)]
    pd.DataFrame(rows, columns=["path", "split"]).to_csv(tmp_path / "manifest.csv", index=False)
    assert FolderBlocks(tmp_path).paths == ["5.png", "4.png", "3.png", "2.png", "1.png"]
    assert FolderBlocks(tmp_path, splits=["train"]).paths == ["5.png", "2.png"]
    assert FolderBlocks(tmp_path, splits=["test", "train"]).paths == ["5.png", "3.png", "2.png"]
    with pytest.raises(UserError, match="has no split Train: it has test, train, val"):
        FolderBlocks(tmp_path, splits=["Train"])
    with pytest.raises(UserError, match="no manifest.csv"):
        FolderBlocks(folder, splits=["train"])
    (tmp_path / "3.png").unlink()
    with pytest.raises(UserError, match="names 3.png, which is not in"):
        FolderBlocks(tmp_path)


@pytest.mark.parametrize("in_memory", [False, True])
def test_images_that_cannot_be_read_are_left_out_and_counted(tmp_path, capsys, in_memory):
    for i in range(8):
        draw(tmp_path / f"{i}.jpg", 10 * i, quality=100)
    (tmp_path / "2.jpg").write_bytes(b"no image at all")
    whole = (tmp_path / "5.jpg").read_bytes()
    (tmp_path / "5.jpg").write_bytes(whole[:-100])  # the header is good
    Image.new("CMYK", (16, 16)).save(tmp_path / "6.jpg")
    source = FolderBlocks(tmp_path, block=3, in_memory=in_memory)
    rows = source.read(range(len(source)))
    left_out = {slide for slide, tile in zip(rows.slides, rows.tiles) if tile is None}
    assert left_out == {"2.jpg", "5.jpg", "6.jpg"}
    assert source.tiles == 5
    assert [problem.split(" ")[0].split("/")[-1] for problem in source.problems] == ["2.jpg", "5.jpg", "6.jpg"]
    source.read(range(len(source)))
    said = capsys.readouterr().err
    assert said.count("5.jpg") == 1 and "2.jpg" not in said  # known from the beginning, as 6.jpg is
    seen = names(take(loader(source, batch_size=5), 2))
    assert sorted(seen) == sorted(2 * [f"{i}.jpg" for i in (0, 1, 3, 4, 7)])


def test_a_grey_jpeg_is_read_as_read_tile_reads_it(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "grey.jpg")
    (tile,) = FolderBlocks(tmp_path).read([0]).tiles
    np.testing.assert_array_equal(tile, read_tile(tmp_path / "grey.jpg"))


def test_an_image_of_another_size_is_named_before_anything_is_decoded(tmp_path):
    for i in range(4):
        draw(tmp_path / f"{i}.png", i)
    draw(tmp_path / "2.png", edge=24)
    draw(tmp_path / "3.png", edge=32)
    with pytest.raises(UserError, match=r"2.png has 24 x 24 px and 0.png has 16 x 16"):
        FolderBlocks(tmp_path)


def test_images_that_are_no_square_tiles_are_refused(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="20 x 10 px: tiles are square"):
        FolderBlocks(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no image"):
        FolderBlocks(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        FolderBlocks(tmp_path / "nowhere")
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match="none of its 1 images can be read"):
        FolderBlocks(tmp_path)


def test_the_fingerprint_changes_with_the_images_and_not_with_how_they_are_read(tmp_path):
    for i in range(4):
        draw(tmp_path / f"{i}.png", i)
    before = FolderBlocks(tmp_path)
    assert before.fingerprint == FolderBlocks(tmp_path, block=2, in_memory=True).fingerprint
    draw(tmp_path / "4.png", 4)
    assert before.fingerprint != FolderBlocks(tmp_path).fingerprint


def test_a_filter_drops_tiles_by_their_pixels(folder):
    bright = tile_filter(FilterOptions(min_brightness=140))
    for in_memory in (False, True):
        source = FolderBlocks(folder, tile_filter=bright, in_memory=in_memory)
        rows = source.read(range(len(source)))
        kept = [tile for tile in rows.tiles if tile is not None]
        assert 0 < len(kept) < COUNT and source.tiles == COUNT
        assert kept and all(bright(tile) for tile in kept)


def test_pixels_are_not_sent_to_workers_which_decode_for_themselves_where_they_are_not_forked(folder):
    source = FolderBlocks(folder, block=4, in_memory=True)
    sent = pickle.dumps(source)
    assert len(sent) < COUNT * 16 * 16 * 3 / 4
    expected = source.read([1])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rows = pool.apply(pickle.loads(sent).read, ([1],))
    assert rows.slides == expected.slides
    np.testing.assert_array_equal(rows.tiles, expected.tiles)


def test_tiles_in_memory_are_decoded_once(folder, monkeypatch):
    source = FolderBlocks(folder, block=4, in_memory=True)
    monkeypatch.setattr(source, "_decode", None)
    assert len(names(take(loader(source), 20))) == 100


def test_more_pixels_than_the_memory_holds_are_refused(folder, monkeypatch):
    monkeypatch.setattr("hf_pathology.tiles.folder_blocks.MEMORY_SHARE", 1e-9)
    with pytest.raises(UserError, match="do not keep it in memory"):
        FolderBlocks(folder, in_memory=True)
