import os
import subprocess
import sys

import numpy as np
import pytest

from hf_pathology.errors import UserError
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.grid import tile_grid
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.staging import MARKER, StagedSlides, remove_abandoned
from hf_pathology.slides.tissue import Tissue


@pytest.fixture
def slides(tmp_path):
    paths = []
    for number in range(3):
        paths.append(tmp_path / "slides" / f"{number}.svs")
        paths[-1].parent.mkdir(exist_ok=True)
        write_aperio(paths[-1], np.full((512, 512, 3), 60 * number + 40, np.uint8), 0.5)
    return paths


def test_slides_are_read_from_copies_that_are_removed_when_done(slides, tmp_path):
    everywhere = Tissue(np.ones((1, 1), bool), (512.0, 512.0))
    grids = [tile_grid(Slide(path), everywhere, key=path.name, size=128, mpp=0.5) for path in slides]
    fast = tmp_path / "fast"
    with StagedSlides(fast) as staged:
        for grid, copy in staged.ahead(zip(grids, slides)):
            original = slides[grids.index(grid)]
            assert copy != original and fast in copy.parents
            with grid.open(copy) as opened:  # recognised as the slide that was tiled
                tiles, valid = opened.read_tiles(grid.xy, 128, grid.extent)
            assert valid.all() and tiles[0].mean() == pytest.approx(60 * int(original.stem) + 40, abs=2)
            staged.release(original)
            assert not copy.exists() and original.exists()
    assert list(fast.iterdir()) == []


def test_nothing_of_others_is_ever_removed(slides, tmp_path):
    fast = tmp_path / "fast"
    (fast / "hf_pathology-elsewhere-1").mkdir(parents=True)
    for name in ("thesis.txt", "hf_pathology-elsewhere-1/precious.svs"):
        (fast / name).write_text("mine")
    with StagedSlides(fast) as staged:
        (staged.folder / "note.txt").write_text("mine too")
        list(staged.ahead((path, path) for path in slides))
    remove_abandoned(fast)
    left = sorted(path.name for path in fast.rglob("*") if path.is_file())
    assert left == ["note.txt", "precious.svs", "thesis.txt"]


def test_copies_of_a_killed_process_are_removed_by_the_next(slides, tmp_path):
    fast = tmp_path / "fast"
    script = (
        "import os, sys, signal; from pathlib import Path; from hf_pathology.slides.staging import StagedSlides\n"
        "with StagedSlides(sys.argv[1]) as staged:\n"
        "    list(staged.ahead([(0, Path(sys.argv[2]))])); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(fast), str(slides[0])], check=False)
    (abandoned,) = fast.iterdir()
    assert {path.name for path in abandoned.iterdir()} == {MARKER, "0.svs"}
    remove_abandoned(fast)
    assert list(fast.iterdir()) == []


def test_without_room_slides_are_read_where_they_lie(slides, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_pathology.slides.staging.SPARE", 1 << 60)
    with StagedSlides(tmp_path / "fast") as staged:
        assert [copy for _, copy in staged.ahead((path, path) for path in slides)] == slides


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "fast").write_text("")
    with pytest.raises(UserError, match="fast is a file"):
        remove_abandoned(tmp_path / "fast")
    with pytest.raises(UserError, match="fast"), StagedSlides(tmp_path / "fast"):
        pass
    assert os.path.isfile(tmp_path / "fast")
