import shutil

import pytest

from hf_pathology.errors import UserError
from hf_pathology.slides.cohort import find_slides, read_cohort


@pytest.fixture()
def folder(ramp_slide, tmp_path):
    for name in ("a.svs", "sub/a.svs", "sub/b.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ramp_slide, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no slide")
    (tmp_path / ".b.svs.1.partial").write_text("half written")
    return tmp_path


def table(folder, text):
    path = folder / "cohort.csv"
    path.write_text(text)
    return path


def test_slides_of_the_same_name_in_different_folders_have_different_keys(folder):
    assert [slide.key for slide in find_slides(folder)] == ["a.svs", "sub/a.svs", "sub/b.svs"]


def test_a_folder_without_slides_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no slide"):
        find_slides(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        find_slides(tmp_path / "nowhere")


def test_the_table_names_slides_by_path_or_by_a_unique_name(folder):
    slides, missing = read_cohort(table(folder, "slide,case,label,mpp\nsub/a.svs,p1,x,\nb,p2,y,0.3\n"), folder)
    assert [(slide.key, slide.case, slide.label, slide.mpp) for slide in slides] == [
        ("sub/a.svs", "p1", "x", None),
        ("sub/b.svs", "p2", "y", 0.3),
    ]
    assert missing == []


def test_a_slide_that_is_not_there_is_reported_and_the_others_are_kept(folder):
    slides, missing = read_cohort(table(folder, "slide\nb.svs\nghost.svs\n"), folder)
    assert [slide.key for slide in slides] == ["sub/b.svs"]
    assert len(missing) == 1 and "ghost.svs is named in" in missing[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\nb\n", "has no column slide"),
        ("slide\nb\nsub/b.svs\n", "names sub/b.svs twice"),
        ("slide,mpp\nb,fast\n", "'fast' is not a positive number"),
        ("slide\nghost\n", "names no slide that is in"),
        ("", "cannot be read as CSV"),
    ],
)
def test_a_wrong_table_is_refused_with_the_place(folder, text, message):
    with pytest.raises(UserError, match=message):
        read_cohort(table(folder, text), folder)
