"""Foreign files are read, and never trusted: what they ask for is not run, and what they name stays where it is."""

import bz2
import collections
import gzip
import io
import json
import lzma
import os
import pickle
import random
import struct
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from original_checkpoints import dino_checkpoint, saved, simclr_checkpoint, tar_of, zip_of
from safetensors.torch import save_file
from torch.serialization import get_safe_globals, safe_globals

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.conversion.foreign_checkpoint import open_checkpoint


WEIGHTS = {"norm.weight": torch.arange(4.0), "norm.bias": torch.zeros(4)}


def content_of(path: Path, **options) -> dict:
    with open_checkpoint(path, **options) as checkpoint:
        return {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in checkpoint.content.items()
        }


def assert_is_refused(path: Path, *words: str, **options) -> None:
    """One line that has these words."""
    with pytest.raises(UserError) as refused, open_checkpoint(path, **options):
        pass
    assert "\n" not in str(refused.value) and str(path) in str(refused.value), refused.value
    for word in words:
        assert word in str(refused.value), refused.value


# What is read.


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_checkpoints_of_the_original_trainers_are_read_with_their_settings(tmp_path, legacy):
    content = content_of(saved(dino_checkpoint(WEIGHTS), tmp_path / "checkpoint.pth", legacy=legacy))
    assert content["args"] == Namespace(arch="vit_small", patch_size=16, output_dir="/runs", use_fp16=True)
    assert torch.equal(content["teacher"]["backbone.norm.weight"], WEIGHTS["norm.weight"])
    assert content["optimizer"]["param_groups"][0]["lr"] == 1e-4
    hparams = content_of(saved(simclr_checkpoint(WEIGHTS), tmp_path / "c.pth.tar", legacy=legacy))["hparams"]
    assert str(hparams.root) == "/logs/exman/000001"


@pytest.mark.parametrize("number", [np.float64(-1.5), np.float32(0.25), np.int64(7), np.bool_(True), np.uint8(200)])
def test_numpy_scalars_are_read_without_numpy(tmp_path, number):
    assert content_of(saved({"epoch": number}, tmp_path / "c.pt")) == {"epoch": number.item()}


def test_safetensors_a_folder_of_the_hub_its_parts_and_archives_hold_the_same(tmp_path):
    first, second = ({name: tensor} for name, tensor in WEIGHTS.items())
    parts = tmp_path / "parts"
    parts.mkdir()
    save_file(first, parts / "model-00001-of-00002.safetensors")
    save_file(second, parts / "model-00002-of-00002.safetensors")
    index = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate(WEIGHTS, start=1)}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (parts / "config.json").write_text('{"model_type": "vit"}')
    bins = tmp_path / "bins"
    bins.mkdir()
    whole = saved(WEIGHTS, bins / "pytorch_model.bin").read_bytes()
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    zipped = zip_of(tmp_path / "drive.zip", {"drive/readme.txt": b"hello", "drive/phikon.pth": whole})
    tarred = tar_of(tmp_path / "drive.tar.gz", {"phikon/pytorch_model.bin": whole, "phikon/config.json": b"{}"})
    for path in (parts, bins, tmp_path / "model.safetensors", zipped, tarred):
        found = content_of(path)
        assert found.keys() == WEIGHTS.keys(), path
        assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())
    with open_checkpoint(parts) as checkpoint:
        assert checkpoint.config == {"model_type": "vit"} and len(checkpoint.files) == 2


def test_a_snapshot_in_the_hubs_cache_leads_to_its_blobs_and_nowhere_else(tmp_path):
    repository = tmp_path / "models--owkin--phikon"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    save_file(WEIGHTS, blobs / "f00d")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    assert content_of(snapshot).keys() == WEIGHTS.keys()
    (snapshot / "model.safetensors").unlink()
    save_file(WEIGHTS, tmp_path / "elsewhere.safetensors")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert_is_refused(snapshot, "'model.safetensors'", "leads out of it")


# What is not run.


class Runs:
    """What a pickle may ask for: any function with any arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def imitation(marker: Path) -> bytes:
    """A pickle of something that calls itself argparse.Namespace and brings a `__setstate__` of its own."""
    touch = b"cposix\nsystem\nX" + struct.pack("<I", len(f"touch {marker}")) + f"touch {marker}".encode() + b"\x85R"
    state = b"}X" + struct.pack("<I", 12) + b"__setstate__" + touch + b"s"
    return b"\x80\x02cargparse\nNamespace\n)\x81" + state + b"b."


def global_of(module: str, name: str, argument: str) -> bytes:
    """A pickle, protocol 2, that calls module.name(argument)."""
    text = argument.encode()
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X" + struct.pack("<I", len(text)) + text + b"\x85R."


def in_a_zip(pickled: bytes) -> bytes:
    """`pickled` where torch's own format has its pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


HOSTILE = {
    "os.system": lambda marker: Runs(os.system, f"touch {marker}"),
    "nested": lambda marker: {"teacher": WEIGHTS, "args": Namespace(deep=[{"x": Runs(os.system, f"touch {marker}")}])},
    "eval": lambda marker: {"model": Runs(eval, f"open({str(marker)!r}, 'w')")},
    "exec": lambda marker: {"model": Runs(exec, f"open({str(marker)!r}, 'w')")},
    "getattr": lambda marker: {"model": Runs(getattr, Path(marker), "touch")},
    "open": lambda marker: {"model": Runs(open, str(marker), "w")},
    "path": lambda marker: {"args": Namespace(root=Runs(Path.touch, marker))},
    "load": lambda marker: {"model": Runs(pickle.loads, pickle.dumps(Runs(os.system, f"touch {marker}")))},
    "numpy": lambda marker: {"epoch": np.array([Runs(os.system, f"touch {marker}")], dtype=object)},
    "ordered": lambda marker: collections.OrderedDict(state_dict=Runs(os.system, f"touch {marker}")),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_pickle_asks_for_is_not_run(tmp_path, name, legacy):
    marker = tmp_path / "marker"
    file = saved(HOSTILE[name](marker), tmp_path / "vit256_small_dino.pth", legacy=legacy)
    assert_is_refused(file, "is not read")
    assert not marker.exists()


@pytest.mark.parametrize("wrapped", [bytes, in_a_zip], ids=["plain", "zip"])
@pytest.mark.parametrize("made", ["imitation", "system", "namespace of main", "dotted"])
def test_pickles_made_by_hand_are_not_run(tmp_path, wrapped, made):
    marker = tmp_path / "marker"
    touch = f"touch {marker}"
    pickled = {
        "imitation": imitation(marker),
        "system": global_of("posix", "system", touch),
        "namespace of main": global_of("__main__", "Namespace", touch),
        "dotted": global_of("argparse", "_os.system", touch),
    }[made]
    pickle.loads(pickled) if made in ("imitation", "system") else None
    assert marker.exists() == (made in ("imitation", "system"))  # the pickles that Python itself runs do run
    marker.unlink(missing_ok=True)
    (tmp_path / "c.pth").write_bytes(wrapped(pickled))
    assert_is_refused(tmp_path / "c.pth", "is not read")
    assert not marker.exists()


def test_what_other_libraries_have_allowed_is_not_allowed_here(tmp_path):
    file = saved({"epoch": Runs(collections.deque, [1])}, tmp_path / "c.pth")
    with safe_globals([collections.deque]):
        assert torch.load(file, weights_only=True)["epoch"] == collections.deque([1])
        before = set(get_safe_globals())
        assert_is_refused(file, "collections.deque")
        assert set(get_safe_globals()) == before


def test_what_lies_in_an_archive_is_trusted_no_more(tmp_path):
    marker = tmp_path / "marker"
    inside = saved({"model": Runs(os.system, f"touch {marker}")}, tmp_path / "c.pth").read_bytes()
    file = zip_of(tmp_path / "drive.zip", {"drive/c.pth": inside})
    assert_is_refused(file, f"{file}/drive/c.pth holds posix.system")
    assert not marker.exists()


# What does not escape.


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors", "link"])
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    save_file(WEIGHTS, tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": name}}))
    assert_is_refused(folder, name, "leads out of it")


@pytest.mark.parametrize("name", ["../c.pth", "/tmp/c.pth", "a/../../c.pth", "..\\c.pth", "C:\\c.pth"])
@pytest.mark.parametrize("kind", [zip_of, tar_of])
def test_members_of_archives_stay_in_the_folder_they_are_unpacked_to(tmp_path, kind, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    file = kind(inside / "drive.archive", {name: b"anything"})
    assert_is_refused(file, "leads out of the folder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["drive.archive", "inside"]


def test_links_in_archives_are_not_unpacked(tmp_path):
    assert_is_refused(tar_of(tmp_path / "a.tar.gz", {}, weights="/etc/passwd"), "weights", "is not unpacked")
    info = zipfile.ZipInfo("weights")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert_is_refused(tmp_path / "a.zip", "the link weights", "is not unpacked")


def test_sizes_are_counted_before_anything_is_read(tmp_path):
    file = saved(WEIGHTS, tmp_path / "c.pth")
    assert_is_refused(file, "pass --max-gb", max_bytes=1000)
    bomb = zip_of(tmp_path / "bomb.zip", {"c.pth": bytes(10**7)})
    assert bomb.stat().st_size < 10**5
    assert_is_refused(bomb, "0.01 GB", "pass --max-gb", max_bytes=10**6)
    bomb = tar_of(tmp_path / "bomb.tar.gz", {"c.pth": bytes(10**7)})
    assert_is_refused(bomb, "pass --max-gb", max_bytes=10**6)


def test_an_archive_whose_header_is_a_bomb_is_refused(tmp_path):
    file = tmp_path / "bomb.tar.gz"
    with tarfile.open(file, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("c.pth"))
        bomb = tarfile.TarInfo("d.pth")
        bomb.pax_headers = {"comment": "x" * 2**21}
        archive.addfile(bomb)
    assert_is_refused(file, "a header of 2097")


def test_a_zip_that_gives_more_than_it_holds_is_none_of_torchs(tmp_path):
    bomb = zip_of(tmp_path / "c.pth", {"archive/data.pkl": bytes(10**7), "archive/version": b"3\n"})
    assert_is_refused(bomb, "which torch never writes")


# What is damaged.


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.999, 0.9, 0.5, 0.1])
def test_a_file_that_was_not_copied_whole_is_named(tmp_path, share, legacy):
    whole = saved({"model": {"norm.weight": torch.randn(1000)}}, tmp_path / "c.pth", legacy=legacy).read_bytes()
    (tmp_path / "c.pth").write_bytes(whole[: int(len(whole) * share)])
    assert_is_refused(tmp_path / "c.pth", "fetch it again")


@pytest.mark.parametrize("name", ["c.pth", "legacy.pth", "c.safetensors", "c.tar.gz", "c.zip"])
def test_bytes_that_were_overwritten_end_in_one_line_or_in_other_weights(tmp_path, name):
    file = tmp_path / name
    whole = saved(dino_checkpoint(WEIGHTS), tmp_path / "whole.pth", legacy=name == "legacy.pth").read_bytes()
    file.write_bytes(whole)
    if name == "c.safetensors":
        save_file(WEIGHTS, file)
    if name in ("c.tar.gz", "c.zip"):
        (zip_of if name == "c.zip" else tar_of)(file, {"folder/c.pth": whole})
    whole, draw, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in draw.sample(range(len(whole)), k=draw.choice([1, 3, 30])):
            damaged[place] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            assert isinstance(content_of(file), dict)
        except UserError as error:
            assert "\n" not in str(error) and str(file) in str(error)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("compression", [gzip, bz2, lzma], ids=["gz", "bz2", "xz"])
def test_compressed_tars_of_any_size_are_unpacked(tmp_path, compression):
    weights = {"norm.weight": torch.arange(400_000, dtype=torch.float32)}
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        archive.add(saved(weights, tmp_path / "c.pth"), "drive/c.pth")
    file = tmp_path / "drive.archive"
    file.write_bytes(compression.compress((tmp_path / "c.tar").read_bytes()))
    assert torch.equal(content_of(file)["norm.weight"], weights["norm.weight"])


def test_other_damage_is_named(tmp_path):
    save_file(WEIGHTS, tmp_path / "c.safetensors")
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-3])
    assert_is_refused(tmp_path / "c.safetensors", "fetch it again")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html> quota exceeded")
    assert_is_refused(tmp_path / "page.pth", "is no checkpoint")
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert_is_refused(tmp_path / "lfs.pth", "git lfs pull")
    (tmp_path / "empty.pth").write_bytes(b"")
    assert_is_refused(tmp_path / "empty.pth", "is no checkpoint")
    assert_is_refused(saved([1, 2], tmp_path / "list.pth"), "a list")
    assert_is_refused(tmp_path / "nowhere.pth", "does not exist")
    half = tar_of(tmp_path / "half.tar.gz", {"c.pth": os.urandom(10**5)})
    half.write_bytes(half.read_bytes()[:50_000])
    assert_is_refused(half, "fetch it again")


def test_a_folder_that_lacks_a_part_or_holds_too_many_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert_is_refused(tmp_path, "lacks model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert_is_refused(tmp_path, "no weight_map")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_is_refused(tmp_path, "holds none")
    for name in ("a.pth", "b.pth"):
        saved(WEIGHTS, tmp_path / name)
    assert_is_refused(tmp_path, "a.pth, b.pth", "pass the one that you mean")


def test_a_program_of_torchscript_is_not_run(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_STORED) as archive:
        for name in ("c/data.pkl", "c/constants.pkl", "c/code/__torch__.py", "c/version"):
            archive.writestr(name, "3\n")
    assert_is_refused(tmp_path / "c.pt", "TorchScript")
