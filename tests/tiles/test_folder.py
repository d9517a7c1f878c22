"""Labelled tile folders: layouts, splits by group, and errors that name the file."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_pathology.errors import UserError
from hf_pathology.tiles.folder import TileDataset, colour_numbers, read_tile_folder, split_by_group


def draw_tile(path, colour=(200, 100, 150), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def class_folders(tmp_path):
    for name in ("stroma/a.png", "stroma/b.jpg", "tumour/a.PNG", "tumour/case_7/b.tif", "tumour/case_7/c.tiff"):
        draw_tile(tmp_path / name)
    (tmp_path / "tumour" / "notes.txt").write_text("not a tile")
    return tmp_path


def write_table(folder, rows, **columns):
    table = folder / "manifest.csv"
    pd.DataFrame(rows, columns=["path", "class", *columns.get("more", [])]).to_csv(table, index=False)
    return table


def test_class_folders_give_sorted_classes_and_labels_into_them(class_folders):
    tiles = read_tile_folder(class_folders)
    assert tiles.classes == ("stroma", "tumour")
    assert tiles.paths.tolist()[:2] == ["stroma/a.png", "stroma/b.jpg"]
    assert tiles.labels.tolist() == [0, 0, 1, 1, 1]
    assert tiles.splits is None


def test_a_tile_folder_without_a_resolution_says_so(class_folders):
    assert read_tile_folder(class_folders).mpp is None
    assert read_tile_folder(class_folders, mpp=0.5).mpp == 0.5


def test_tiles_below_a_case_folder_are_one_group_and_others_are_their_own(class_folders):
    tiles = read_tile_folder(class_folders)
    groups = dict(zip(tiles.paths, tiles.groups))
    assert groups["tumour/case_7/b.tif"] == groups["tumour/case_7/c.tiff"] == "case_7"
    assert groups["stroma/a.png"] == "stroma/a.png"


def test_split_folders_above_the_classes_are_the_split(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/2.png"):
        draw_tile(tmp_path / name)
    tiles = read_tile_folder(tmp_path)
    assert tiles.splits.tolist() == ["train", "train", "val", "val"]
    assert tiles.subset("val").paths.tolist() == ["val/a/2.png", "val/b/2.png"]


def test_a_manifest_gives_class_group_and_split(tmp_path):
    rows = [("x/1.png", "b", "g1", "train"), ("x/2.png", "a", "g2", "val"), ("3.png", "a", "", "train")]
    for row in rows:
        draw_tile(tmp_path / row[0])
    write_table(tmp_path, rows, more=["group", "split"])
    tiles = read_tile_folder(tmp_path)
    assert tiles.paths.tolist() == ["x/1.png", "x/2.png", "3.png"]
    assert tiles.labels.tolist() == [1, 0, 0]
    assert tiles.groups.tolist() == ["g1", "g2", "3.png"]
    assert tiles.splits.tolist() == ["train", "val", "train"]


def test_a_manifest_may_say_label_and_case(tmp_path):
    for name in ("1.png", "2.png"):
        draw_tile(tmp_path / name)
    table = tmp_path / "tiles.csv"
    table.write_text("path,label,case\n1.png,0,p1\n2.png,1,p2\n")
    tiles = read_tile_folder(tmp_path, table)
    assert tiles.classes == ("0", "1")
    assert tiles.groups.tolist() == ["p1", "p2"]


def test_tiles_are_decoded_to_uint8_with_channels_last(tmp_path):
    draw_tile(tmp_path / "a" / "1.png", (10, 20, 30), size=(6, 4))
    draw_tile(tmp_path / "b" / "1.png")
    item = TileDataset(read_tile_folder(tmp_path))[0]
    assert item["tiles"].shape == (4, 6, 3)
    assert item["tiles"].dtype == np.uint8
    assert item["tiles"][0, 0].tolist() == [10, 20, 30]
    assert item["labels"] == 0


def test_a_view_is_made_of_the_decoded_tile(class_folders):
    dataset = TileDataset(read_tile_folder(class_folders), view=lambda tile: tile[:2, :3])
    assert dataset[4]["tiles"].shape == (2, 3, 3)


def test_colour_numbers_are_mean_and_deviation_of_each_channel(tmp_path):
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[..., 0] = [[0, 4], [0, 4]]
    draw_tile(tmp_path / "a" / "1.png", (7, 8, 9))
    (tmp_path / "b").mkdir()
    Image.fromarray(pixels).save(tmp_path / "b" / "1.png")
    flat, split = colour_numbers(read_tile_folder(tmp_path))
    assert flat.tolist() == [7, 8, 9, 0, 0, 0]
    np.testing.assert_allclose(split, [2, 0, 0, 2, 0, 0])


def many_tiles(folder, groups_per_class=10, tiles_per_group=3):
    rows = []
    for name in ("a", "b", "c"):
        for group in range(groups_per_class):
            for tile in range(tiles_per_group):
                rows.append((f"{name}_{group}_{tile}.png", name, f"{name}_{group}"))
                (folder / rows[-1][0]).touch()
    write_table(folder, rows, more=["group"])
    return read_tile_folder(folder)


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_never_on_both_sides(tmp_path, seed):
    tiles = split_by_group(many_tiles(tmp_path), val_fraction=0.2, seed=seed)
    train, val = tiles.subset("train"), tiles.subset("val")
    assert not set(train.groups) & set(val.groups)
    assert len(train) + len(val) == len(tiles)
    assert np.bincount(val.labels).tolist() == [6, 6, 6]


def test_the_seed_decides_the_split(tmp_path):
    tiles = many_tiles(tmp_path)
    same = [split_by_group(tiles, seed=3).splits.tolist() for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != split_by_group(tiles, seed=4).splits.tolist()


def test_a_group_that_holds_several_classes_stays_whole(tmp_path):
    rows = [(f"{case}_{name}.png", name, f"case_{case}") for case in range(5) for name in "ab"]
    for row in rows:
        (tmp_path / row[0]).touch()
    write_table(tmp_path, rows, more=["group"])
    tiles = split_by_group(read_tile_folder(tmp_path))
    assert len(set(tiles.subset("val").groups)) == 1
    assert len(tiles.subset("val")) == 2


def test_two_groups_of_each_class_can_be_split(tmp_path):
    tiles = split_by_group(many_tiles(tmp_path, groups_per_class=2), val_fraction=0.2)
    assert np.bincount(tiles.subset("val").labels).tolist() == [3, 3, 3]


def test_a_class_with_one_group_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match="one group of class a"):
        split_by_group(many_tiles(tmp_path, groups_per_class=1))


def test_a_stated_split_that_shares_a_group_is_refused(tmp_path):
    rows = [("1.png", "a", "g1", "train"), ("2.png", "b", "g1", "val")]
    for row in rows:
        draw_tile(tmp_path / row[0])
    write_table(tmp_path, rows, more=["group", "split"])
    with pytest.raises(UserError, match="group g1 in 2 splits"):
        read_tile_folder(tmp_path)


@pytest.mark.parametrize("split", ["test2", ""])
def test_a_split_of_another_name_is_refused_with_the_tile(tmp_path, split):
    rows = [("1.png", "a", "train"), ("2.png", "b", split)]
    for row in rows:
        draw_tile(tmp_path / row[0])
    write_table(tmp_path, rows, more=["split"])
    with pytest.raises(UserError, match="2.png into split"):
        read_tile_folder(tmp_path)


def test_a_split_that_lacks_a_class_is_refused(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "val/a/2.png"):
        draw_tile(tmp_path / name)
    with pytest.raises(UserError, match="no tile of class b in split val"):
        read_tile_folder(tmp_path).subset("val")


def test_a_folder_beside_the_split_folders_is_not_skipped_in_silence(tmp_path):
    for name in ("train/a/1.png", "valid/a/2.png"):
        draw_tile(tmp_path / name)
    with pytest.raises(UserError, match="holds valid beside train"):
        read_tile_folder(tmp_path)


def test_a_folder_without_images_says_what_was_expected(tmp_path):
    draw_tile(tmp_path / "loose.png")
    with pytest.raises(UserError, match="holds no image: expected <class>"):
        read_tile_folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_tile_folder(tmp_path / "nowhere")


def test_one_class_is_refused_by_name(tmp_path):
    draw_tile(tmp_path / "tumour" / "1.png")
    with pytest.raises(UserError, match="one class only, tumour"):
        read_tile_folder(tmp_path)


def test_a_manifest_that_names_a_missing_file_is_refused_by_name(tmp_path):
    draw_tile(tmp_path / "1.png")
    table = write_table(tmp_path, [("1.png", "a"), ("gone.png", "b")])
    with pytest.raises(UserError, match=f"{table.name} names gone.png"):
        read_tile_folder(tmp_path)


def test_a_manifest_without_classes_is_refused(tmp_path):
    (tmp_path / "manifest.csv").write_text("path\n1.png\n")
    with pytest.raises(UserError, match="no column class or label"):
        read_tile_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_an_unreadable_image_is_named(class_folders, content):
    (class_folders / "stroma" / "b.jpg").write_bytes(content)
    with pytest.raises(UserError, match="b.jpg cannot be read as an image"):
        TileDataset(read_tile_folder(class_folders))[1]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    draw_tile(tmp_path / "a" / "1.png")
    path = tmp_path / "b" / f"1{suffix}"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=f"1{suffix} cannot be read as an image"):
        colour_numbers(read_tile_folder(tmp_path))


def test_a_16_bit_image_is_refused_rather_than_clipped(tmp_path):
    draw_tile(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "b" / "1.png")
    with pytest.raises(UserError, match="1.png is an image of mode I;16"):
        TileDataset(read_tile_folder(tmp_path))[1]


def test_the_real_manifest_keeps_its_groups_apart(real_data):
    tiles = read_tile_folder(real_data / "tiles" / "lc25000_lung224")
    assert tiles.classes == ("lung_aca", "lung_n", "lung_scc")
    assert not set(tiles.subset("train").groups) & set(tiles.subset("val").groups)
