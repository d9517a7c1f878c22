import json
import os

import pytest
import torch

from hf_pathology.atomic import atomic_directory, atomic_path, write_json
from hf_pathology.errors import UserError


FULL = "/dev/full"  # a device that is always full


def test_a_file_is_there_only_when_it_is_whole(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    with atomic_path(path) as partial:
        partial.write_text("whole")
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_a_directory_replaces_the_one_before_only_when_it_is_whole(tmp_path):
    path = tmp_path / "release"
    with atomic_directory(path) as partial:
        (partial / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_directory(path) as partial:
        (partial / "new").write_text("new")
        raise ZeroDivisionError
    assert [file.name for file in path.iterdir()] == ["old"]
    with atomic_directory(path) as partial:
        (partial / "new").write_text("new")
    assert [file.name for file in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists(FULL), reason="needs a device that is always full")
@pytest.mark.parametrize("write", ["text", "torch"])
def test_a_full_disk_is_named_with_the_file(tmp_path, write):
    path = tmp_path / "file"
    with (
        pytest.raises(UserError, match="file cannot be written: (N|n)o space left on device"),
        atomic_path(path) as partial,
    ):
        partial.symlink_to(FULL)
        if write == "text":
            partial.write_text("x" * 100_000)
        else:
            torch.save({"weight": torch.zeros(100_000)}, partial)
    assert list(tmp_path.iterdir()) == []


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"slide": "é", "n": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"slide": "é", "n": 1}
