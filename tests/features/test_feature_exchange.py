"""Features of other programs: files as these write them land on known tiles, come back whole, and never run code."""

import io
import json
import os
import pickle
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from hf_pathology.errors import UserError
from hf_pathology.features.exchange import read_features
from hf_pathology.features.export import write_features
from hf_pathology.features.region_tar import iterate_region_tar, write_region_tar
from hf_pathology.features.store import SlideFeatures
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.grid import TileGrid
from hf_pathology.slides.reader import Slide


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
CORNERS = np.array([[0, 0], [128, 0], [0, 128], [128, 128]])


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Slide:
    """256 x 256 pixels at 0.25 mpp."""
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    write_aperio(path, np.full((256, 256, 3), 200, np.uint8), 0.25, quality=90, downsamples=(1,))
    return Slide(path)


@pytest.fixture
def grid(slide) -> TileGrid:
    """Four tiles of 64 pixels at 0.5 mpp, which are a region of 2 x 2."""
    return TileGrid(
        slide="a.svs",
        size=64,
        mpp=0.5,
        slide_mpp=(0.25, 0.25),
        extent=(128.0, 128.0),
        stride=(128.0, 128.0),
        slide_size=slide.dimensions,
        xy=CORNERS,
        tissue_fraction=np.ones(4, np.float32),
        region=2,
    )


@pytest.fixture
def bag(grid) -> SlideFeatures:
    features = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    return SlideFeatures.of_grid(grid, features, np.ones(4, bool), encoder="uni", revision="1", pooling="cls")


def same_bag(one: SlideFeatures, other: SlideFeatures, tolerance: float = 0) -> bool:
    names = ("slide", "size", "mpp", "extent", "slide_size")
    facts = all(getattr(one, name) == getattr(other, name) for name in names)
    places = np.array_equal(one.xy, other.xy) and np.array_equal(one.valid, other.valid)
    return facts and places and np.allclose(one.features, other.features, rtol=0, atol=tolerance)


@pytest.mark.parametrize("format, name", [("trident", "a.h5"), ("stamp", "a.h5"), ("owkin", "a/features.npy")])
def test_formats_that_say_where_tiles_are_come_back_with_the_slide_alone(bag, grid, slide, tmp_path, format, name):
    options = {"slide_mpp": grid.slide_mpp} if format == "stamp" else {}
    write_features(bag, tmp_path / name, format, **options)
    back = read_features(tmp_path / name, slide=slide)
    assert same_bag(bag, back, tolerance=2e-3 if format == "stamp" else 0)
    assert (back.encoder, back.revision, back.pooling) == ("uni", "unknown", "unknown")


@pytest.mark.parametrize(
    "format, name, options",
    [
        ("clam", "a.h5", {}),
        ("pt", "a.pt", {}),
        ("pt", "a.pt", {"region": 2}),
        ("slide2vec", "a.pt", {}),
        ("slide2vec", "a.npz", {}),
        ("slide2vec", "a.npz", {"region": 2}),
        ("trident", "a.h5", {}),
        ("owkin", "features.npy", {}),
        ("stamp", "a.h5", {"slide_mpp": (0.25, 0.25)}),
    ],
)
def test_every_format_comes_back_with_the_grid(bag, grid, tmp_path, format, name, options):
    write_features(bag, tmp_path / name, format, **options)
    back = read_features(tmp_path / name, grid, encoder="uni", revision="1", pooling="cls")
    assert same_bag(bag, back, tolerance=2e-3 if format == "stamp" else 0)
    assert back.features.dtype == np.float32 and back.revision == "1"


def test_features_kept_as_float16_in_a_mapped_file_are_exported(bag, grid, tmp_path):
    halved = replace(bag, features=bag.features.astype(np.float16))
    halved.save(tmp_path / "a.safetensors")
    for format, name in (("clam", "a.h5"), ("pt", "a.pt"), ("owkin", "a.npy")):
        write_features(SlideFeatures.load(tmp_path / "a.safetensors"), tmp_path / name, format)
        back = read_features(tmp_path / name, grid, encoder="uni")
        assert np.array_equal(back.features, halved.features.astype(np.float32))


def test_hdf5_is_written_without_chunks_of_one_row(bag, tmp_path):
    for format, name in (("clam", "features"), ("trident", "features"), ("stamp", "feats")):
        write_features(bag, tmp_path / "a.h5", format, **({"slide_mpp": (0.25, 0.25)} if format == "stamp" else {}))
        with h5py.File(tmp_path / "a.h5") as file:
            assert file[name].chunks is None and file["coords"].chunks is None


def test_features_as_stamp_writes_them_lie_at_their_microns(slide, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["coords"] = np.array([[0, 0], [32, 0], [0, 32]], np.float32)
        file["feats"] = np.arange(9, dtype=np.float16).reshape(3, 3)
        file.attrs.update(stamp_version="2.4.0", extractor="uni-1", unit="um", tile_size_um=32.0, tile_size_px=64)
        file.attrs.update(code_hash="abcdef12", feat_type="tile")
    bag = read_features(tmp_path / "a.h5", slide=slide)
    assert bag.xy.tolist() == [[0, 0], [128, 0], [0, 128]]
    assert (bag.extent, bag.size, bag.mpp, bag.encoder, bag.slide) == ((128.0, 128.0), 64, 0.5, "uni-1", "a.svs")
    assert bag.features.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["feat_type"] = "slide"
    with pytest.raises(UserError, match="features of a slide, not of tiles"):
        read_features(tmp_path / "a.h5", slide=slide)


def test_features_as_trident_writes_them_say_everything(slide, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        features = file.create_dataset("features", data=np.ones((2, 5), np.float32), maxshape=(None, 5), chunks=(1, 5))
        coords = file.create_dataset("coords", data=CORNERS[:2], maxshape=(None, 2), chunks=(1, 2))
        features.attrs.update(name="a", savetodir="out", encoder="conch_v15")
        coords.attrs.update(patch_size=64, patch_size_level0=128, level0_magnification=40, target_magnification=20)
        coords.attrs.update(overlap=0, name="a", savetodir="out", level0_width=256, level0_height=256)
    bag = read_features(tmp_path / "a.h5", slide=slide, key="cohort/a.svs")
    assert (bag.slide, bag.encoder, bag.size, bag.mpp) == ("cohort/a.svs", "conch_v15", 64, 0.5)
    assert bag.extent == (128.0, 128.0) and bag.slide_size == (256, 256)


def test_features_as_owkin_writes_them_lie_at_their_addresses(slide, tmp_path):
    rows = np.hstack([[[7, 0, 0], [7, 1, 1]], np.full((2, 4), 0.5)]).astype(np.float32)
    (tmp_path / "A.svs").mkdir()
    np.save(tmp_path / "A.svs" / "features.npy", rows)
    with pytest.raises(UserError, match="does not say which encoder"):
        read_features(tmp_path / "A.svs" / "features.npy", slide=slide, size=64)
    params = {"extractor": "iBOTViTBasePANCAN", "tile_size": "auto", "n_tiles": 1000}
    (tmp_path / "extraction_params.json").write_text(json.dumps(params))
    with pytest.raises(UserError, match="tile_size is 'auto'"):
        read_features(tmp_path / "A.svs" / "features.npy", slide=slide)
    bag = read_features(tmp_path / "A.svs" / "features.npy", slide=slide, size=64)
    assert (bag.encoder, bag.extent, bag.xy.tolist()) == ("iBOTViTBasePANCAN", (128.0, 128.0), [[0, 0], [128, 128]])
    assert bag.features.tolist() == [[0.5] * 4] * 2


def test_regions_of_hipt_are_the_tiles_of_a_grid_of_regions(grid, tmp_path):
    torch.save(torch.arange(24.0).reshape(1, 4, 6), tmp_path / "a.pt")
    bag = read_features(tmp_path / "a.pt", grid, encoder="vit_256")
    assert np.array_equal(bag.features, np.arange(24).reshape(4, 6)) and np.array_equal(bag.xy, CORNERS)
    with pytest.raises(UserError, match="regions of 4 tiles, and the grid regions of 1"):
        read_features(tmp_path / "a.pt", replace(grid, region=1), encoder="vit_256")


def test_rows_are_put_on_their_tiles_in_any_order(bag, grid, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = bag.features[[2, 0]], bag.xy[[2, 0]]
    back = read_features(tmp_path / "a.h5", grid, encoder="uni")
    assert back.xy.tolist() == [[0, 128], [0, 0]] and np.array_equal(back.features, bag.features[[2, 0]])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = bag.features, bag.xy + 1
    with pytest.raises(UserError, match=r"tile at \[1, 1\], where the grid has none"):
        read_features(tmp_path / "a.h5", grid, encoder="uni")


def test_tiles_that_could_not_be_read_are_left_out_or_refused(bag, grid, tmp_path):
    broken = replace(bag, features=bag.features.copy(), valid=np.array([True, False, True, True]))
    broken.features[1] = np.nan
    for format, name in (("clam", "a.h5"), ("trident", "a.h5"), ("owkin", "a.npy")):
        write_features(broken, tmp_path / name, format)
        back = read_features(tmp_path / name, grid, encoder="uni")
        assert back.xy.tolist() == bag.xy[[0, 2, 3]].tolist() and back.valid.all()
    for format in ("pt", "slide2vec"):
        with pytest.raises(UserError, match="1 tiles of a.svs could not be read"):
            write_features(broken, tmp_path / "a.pt", format)
    torch.save(torch.from_numpy(broken.features), tmp_path / "a.pt")
    assert read_features(tmp_path / "a.pt", grid, encoder="uni").valid.tolist() == [True, False, True, True]


def test_a_file_without_coordinates_needs_the_grid_it_was_made_with(bag, grid, slide, tmp_path):
    write_features(bag, tmp_path / "a.pt", "pt")
    with pytest.raises(UserError, match="does not say where its tiles are: pass grid="):
        read_features(tmp_path / "a.pt", slide=slide, encoder="uni")
    with pytest.raises(UserError, match="features of 4 tiles, and the grid has 3"):
        read_features(tmp_path / "a.pt", grid.select(np.arange(3)), encoder="uni")
    with pytest.raises(UserError, match="which encoder made its features: pass encoder="):
        read_features(tmp_path / "a.pt", grid)
    write_features(bag, tmp_path / "a.h5", "clam")
    with pytest.raises(UserError, match="does not say its patch_size"):
        read_features(tmp_path / "a.h5", slide=slide, encoder="uni")


def test_what_a_format_cannot_hold_is_refused(bag, tmp_path):
    with pytest.raises(UserError, match="no format 'zarr': choose one of clam, trident"):
        write_features(bag, tmp_path / "a", "zarr")
    with pytest.raises(UserError, match="pass slide_mpp=grid.slide_mpp"):
        write_features(bag, tmp_path / "a.h5", "stamp")
    with pytest.raises(UserError, match="features beyond 65504"):
        write_features(replace(bag, features=bag.features * 1e6), tmp_path / "a.h5", "stamp", slide_mpp=(0.25, 0.25))
    with pytest.raises(UserError, match="4 tiles make no whole regions of 9"):
        write_features(bag, tmp_path / "a.pt", "pt", region=3)
    with pytest.raises(UserError, match="only ratios of 1, 2, 4"):
        write_features(replace(bag, extent=(100.0, 100.0)), tmp_path / "a.npy", "owkin")
    assert not list(tmp_path.iterdir())


class Malicious:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_of_features_does_not_run(grid, tmp_path):
    torch.save(Malicious(tmp_path / "ran"), tmp_path / "zip.pt")
    torch.save(Malicious(tmp_path / "ran"), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    objects = np.array([Malicious(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "a.npz", features=objects)
    np.save(tmp_path / "a.npy", objects)
    for name in ("zip.pt", "legacy.pt", "plain.pt", "a.npz", "a.npy"):
        with pytest.raises(UserError, match="cannot be read as") as caught:
            read_features(tmp_path / name, grid, encoder="uni")
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97])
def test_a_truncated_file_of_features_is_refused_in_one_line(bag, grid, tmp_path, share):
    files = {"clam": "a.h5", "pt": "a.pt", "slide2vec": "b.npz", "owkin": "a.npy"}
    for format, name in files.items():
        write_features(bag, tmp_path / name, format)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match="cannot be read as|no features that can be read") as caught:
            read_features(tmp_path / name, grid, encoder="uni")
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_features_that_cannot_be_meant_are_refused(grid, tmp_path):
    hostile = {
        "dict.pt": ({"features": torch.ones(4, 6)}, "holds a dict: features are one dense tensor"),
        "whole.pt": (torch.ones(4, 6, dtype=torch.int64), "features are floats"),
        "flat.pt": (torch.ones(4), r"of shape \(4,\)"),
        "empty.pt": (torch.ones(0, 6), r"of shape \(0, 6\)"),
        "sparse.pt": (torch.eye(4).to_sparse(), "one dense tensor"),
        "huge.pt": (torch.ones(1).expand(10**9, 10**3), "more than it holds"),
    }
    for name, (content, message) in hostile.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=message):
            read_features(tmp_path / name, grid, encoder="uni")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = np.ones((4, 6), np.float32), CORNERS[:3]
    with pytest.raises(UserError, match=r"has 4 features, and coordinates of shape \(3, 2\)"):
        read_features(tmp_path / "a.h5", grid, encoder="uni")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["x"] = np.ones((4, 6))
    with pytest.raises(UserError, match="no dataset 'features' .CLAM, TRIDENT."):
        read_features(tmp_path / "b.h5", grid, encoder="uni")
    (tmp_path / "a.txt").write_text("features")
    with pytest.raises(UserError, match="neither HDF5 .CLAM, TRIDENT, STAMP., nor .npy"):
        read_features(tmp_path / "a.txt", grid, encoder="uni")
    np.save(tmp_path / "c.npy", np.ones((4, 768), np.float32) * 0.5)
    with pytest.raises(UserError, match="the first three columns whole numbers"):
        read_features(tmp_path / "c.npy", grid, encoder="uni")


def test_metadata_of_slide2vec_must_match_its_features(bag, grid, tmp_path):
    write_features(bag, tmp_path / "a.pt", "slide2vec")
    meta = json.loads((tmp_path / "a.meta.json").read_text())
    assert (meta["artifact_type"], meta["num_tiles"], meta["encoder_name"]) == ("tile_embeddings", 4, "uni")
    (tmp_path / "a.meta.json").write_text(json.dumps(meta | {"num_tiles": 5}))
    with pytest.raises(UserError, match="4 features, and a.meta.json speaks of 5"):
        read_features(tmp_path / "a.pt", grid)
    (tmp_path / "a.meta.json").write_text(json.dumps(meta | {"artifact_type": "slide_embeddings"}))
    with pytest.raises(UserError, match="holds slide_embeddings"):
        read_features(tmp_path / "a.pt", grid)


def regions() -> list[tuple[str, np.ndarray]]:
    pixels = np.random.default_rng(1).integers(0, 255, (2, 32, 48, 3), dtype=np.uint8)
    return [("a_0_0", pixels[0]), ("a_4096_0", pixels[1])]


def test_regions_in_a_tar_come_back_pixel_by_pixel(tmp_path):
    write_region_tar(tmp_path / "a.tar", regions())
    write_region_tar(tmp_path / "b.tar", iter(regions()))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    for (key, pixels), (expected_key, expected) in zip(iterate_region_tar(tmp_path / "a.tar"), regions(), strict=True):
        assert key == expected_key
        np.testing.assert_array_equal(pixels, expected)
    for keys in (["a.b"], ["../a"], [""], ["a", "a"]):
        with pytest.raises(UserError, match="a key is unique, without dot or slash"):
            write_region_tar(tmp_path / "c.tar", [(key, regions()[0][1]) for key in keys])
    assert not (tmp_path / "c.tar").exists()


def test_names_in_a_tar_never_touch_the_disk_and_links_are_passed_over(tmp_path):
    image = io.BytesIO()
    Image.fromarray(regions()[0][1]).save(image, "PNG")
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in ("../../escaped.png", "/absolute.image", "notes.json"):
            member = tarfile.TarInfo(name)
            member.size = len(image.getvalue())
            tar.addfile(member, io.BytesIO(image.getvalue()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [key for key, _ in iterate_region_tar(folder / "a.tar")] == ["escaped", "absolute"]
    assert [path.name for path in tmp_path.rglob("*")] == ["tars", "a.tar"]


def test_a_damaged_tar_is_refused_in_one_line(tmp_path):
    write_region_tar(tmp_path / "a.tar", regions())
    whole = (tmp_path / "a.tar").read_bytes()
    damaged = {
        "short.tar": whole[:2000],
        "tiny.tar": whole[:100],
        "boundary.tar": whole[: whole.index(b"a_4096_0")],
        "image.tar": whole.replace(b"IDAT", b"XXXX"),
        "text.tar": b"x" * 4096,
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            list(iterate_region_tar(tmp_path / name))
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        list(iterate_region_tar(tmp_path / "none.tar"))


def test_an_image_in_a_tar_that_would_fill_the_memory_is_refused(tmp_path):
    bomb = b"P6 100000 100000 255\n"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("a.ppm")
        member.size = len(bomb)
        tar.addfile(member, io.BytesIO(bomb))
    with pytest.raises(UserError, match="'a.ppm' that is no region"):
        list(iterate_region_tar(tmp_path / "a.tar"))


def test_the_python_of_the_document_on_features_runs(bag, grid, slide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").symlink_to(slide.path)
    grid.save("tiles/grids/a.svs.safetensors")
    write_features(bag, "features_uni/a.h5", "trident")
    write_features(bag, "pt_files/a.pt", "pt")
    write_region_tar("tar_patch_4096/a.tar", regions())
    part = DOCUMENT.read_text(encoding="utf-8").split("## Features")[1]
    blocks = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    exec("\n".join(blocks), {})
    assert blocks and len([path for path in Path("written").rglob("*") if path.is_file()]) == 11
