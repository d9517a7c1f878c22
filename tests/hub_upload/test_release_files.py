"""Which files go up, and what their card must say."""

import hashlib

import pytest
from releases import CARD, release_encoder

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.card_check import check_card
from hf_pathology.hub_upload.carried_code import foreign_code
from hf_pathology.hub_upload.release_files import ReleaseFile, contents_of
from hf_pathology.modeling import AbmilConfig, AbmilForSlideClassification
from hf_pathology.recipes.slide_heads import save_head


RELEASE = ["README.md", "config.json", "fingerprint.json", "model.safetensors", "preprocessor_config.json"]


def test_only_what_belongs_to_a_release_goes_up_and_the_rest_is_listed(tmp_path):
    folder = release_encoder(tmp_path / "release")
    for name in ("slide.svs", "notes.txt", "optimizer.pt", "sub/config.json", "LICENSE", ".DS_Store"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    contents = contents_of(folder, "org/name", [])
    assert [file.path for file in contents.files] == sorted([*RELEASE, "LICENSE"])
    assert set(contents.left) == {"slide.svs", "notes.txt", "optimizer.pt", "sub/config.json", ".DS_Store"}
    assert "pickle" in contents.left["optimizer.pt"]
    assert "notes.txt" in contents_of(folder, "org/name", ["*.txt"])
    with pytest.raises(UserError, match="optimizer.pt is a pickle"):
        contents_of(folder, "org/name", ["*.pt"])
    with pytest.raises(UserError, match="--include \\*.csv fits no file"):
        contents_of(folder, "org/name", ["*.csv"])


def test_sizes_hashes_and_large_files_are_those_of_the_bytes(tmp_path):
    contents = contents_of(release_encoder(tmp_path / "release"), "org/name", [])
    for file in contents.files:
        content = file.source if isinstance(file.source, bytes) else file.source.read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert [file.path for file in contents.files if file.is_large] == ["model.safetensors"]
    assert ReleaseFile("big.json", bytes(10_000_000)).is_large


def test_the_card_that_goes_up_names_the_repository_and_the_folder_stays_as_it_is(tmp_path):
    folder = release_encoder(tmp_path / "release")
    contents = contents_of(folder, "org/name", [])
    assert contents["README.md"].source.decode() == CARD.replace("PATH_OR_ID", "org/name")
    assert (folder / "README.md").read_text() == CARD
    assert [finding.severity for finding in check_card(contents)] == ["note"]  # the licence is not stated


@pytest.mark.parametrize(
    ("card", "lack"),
    [
        (None, "there is no card"),
        (CARD.replace("library_name: transformers", "tags: [a]"), "lack library_name"),
        (CARD.replace("pipeline_tag: image-feature-extraction", "tags: [a]"), "lack pipeline_tag"),
        (CARD.replace("not stated", "as you like"), "has no licence"),
        (CARD.replace("transformers", "[", 1), "metadata cannot be read"),
    ],
)
def test_what_a_card_lacks_is_named(tmp_path, card, lack):
    findings = check_card(contents_of(release_encoder(tmp_path / "release", card=card), "org/name", []))
    assert [lack in finding.what for finding in findings if finding.severity == "error"] == [True]


def test_a_card_with_a_licence_has_nothing_to_be_said_but_what_was_not_filled_in(tmp_path):
    card = CARD.replace("library_name", "license: apache-2.0\nlibrary_name")
    assert check_card(contents_of(release_encoder(tmp_path / "a", card=card), "org/name", [])) == []
    card += "[More Information Needed]"
    (note,) = check_card(contents_of(release_encoder(tmp_path / "b", card=card), "org/name", []))
    assert (note.severity, note.text) == ("note", "[More Information Needed]")


def test_code_is_ours_only_byte_for_byte(tmp_path):
    save_head(AbmilForSlideClassification(AbmilConfig(input_dim=16)), tmp_path / "head")
    contents = contents_of(tmp_path / "head", "org/name", [])
    assert sum(file.path.endswith(".py") for file in contents.files) >= 2 and foreign_code(contents) == []
    (tmp_path / "head" / "modeling_abmil.py").write_text("import os\n")
    (tmp_path / "head" / "more.py").write_text("import os\n")
    assert foreign_code(contents_of(tmp_path / "head", "org/name", [])) == ["modeling_abmil.py", "more.py"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no config.json"),
        (["encoder/config.json"], "is the folder of a run: pass .*encoder"),
        (None, "is no folder"),
    ],
)
def test_a_folder_that_is_no_release_is_refused(tmp_path, names, message):
    folder = tmp_path / "folder"
    for name in names or []:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
    if names is not None:
        folder.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message):
        contents_of(folder, "org/name", [])
