"""`hf-pathology release` against a Hub on this machine, in processes of their own, through the unmodified client."""

import json
from pathlib import Path

import numpy as np
import pytest
from hierarchies import release_hierarchy
from loopback_hub import Failure, LoopbackHub, loopback_hub
from releases import CARD, release_encoder, run_commands, run_python
from safetensors.torch import load_file, save_file

from hf_pathology.features.store import SlideFeatures, features_path
from hf_pathology.features.tables import saved_bags


@pytest.fixture
def hub() -> LoopbackHub:
    with loopback_hub() as running:
        yield running


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def contents(folder: Path, repo_id: str) -> dict[str, bytes]:
    """What is to be on the Hub."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return {**files, "README.md": files["README.md"].replace(b"PATH_OR_ID", repo_id.encode())}


def on_hub(hub: LoopbackHub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    repo = hub.model(repo_id)
    return {name: data for name, data in repo.commits[repo.resolve(revision)].items() if name != ".gitattributes"}


LOAD = """
import json, sys, warnings
warnings.simplefilter("error")
from transformers import AutoImageProcessor, AutoModel
for revision in json.loads(sys.argv[2]):
    try:
        model = AutoModel.from_pretrained(sys.argv[1], revision=revision)
        processor = AutoImageProcessor.from_pretrained(sys.argv[1], revision=revision)
        print(json.dumps([type(model).__module__, float(model.layernorm.weight.sum()), float(model.layers[0].mlp.fc1.weight.sum()), processor.mpp]))
    except OSError as error:
        print(json.dumps(str(error)))
"""


def loaded(hub: LoopbackHub, home: Path, repo_id: str, revisions: list[str], **options) -> list:
    """What a process without any help of ours loads of these revisions."""
    ran = run_python(hub, home, "-I", "-c", LOAD, repo_id, json.dumps(revisions), **options)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in lines_of(ran.stdout)]


def test_versions_of_an_encoder_are_released_pinned_and_loaded_by_anyone_who_may(hub, tmp_path):
    first, second = release_encoder(tmp_path / "first"), release_encoder(tmp_path / "second", seed=1)
    dry, pushed, again, updated, same_tag = run_commands(
        hub,
        tmp_path,
        ["release", first, "org/name"],
        ["release", first, "org/name", "--push", "--tag", "v1", "--public"],
        ["release", second, "org/name", "--push"],
        ["release", second, "org/name", "--push", "--update", "--tag", "v2", "--gated", "manual", "--no-verify"],
        ["release", second, "org/name", "--push", "--update", "--tag", "v1"],
    )
    # By default nothing is sent, and everything is said.
    assert dry.returncode == 0 and "dry run: nothing was sent" in dry.stdout
    assert "org/name: would make the repository, private, and commit" in dry.stdout
    for name, data in contents(first, "org/name").items():
        assert (
            f"{len(data):>15,}  {'LFS' if name.endswith('.safetensors') else 'git'}  " in dry.stdout
            and name in dry.stdout
        )

    # What was sent is there, byte for byte, and was verified before anyone could see it.
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    assert on_hub(hub, "org/name", "v1") == contents(first, "org/name")
    assert "every byte the same; loads whole, and its features are the same" in pushed.stdout
    assert (
        pushed.stdout.index("made org/name, private")
        < pushed.stdout.index("every byte the same")
        < pushed.stdout.index("public")
    )
    repo = hub.model("org/name")
    assert (repo.private, repo.gated, len(repo.commits)) == (False, "manual", 3)  # the first is the Hub's own

    assert again.returncode == 1
    assert lines_of(again.stderr) == [
        "error: org/name exists on the Hub, with 6 files: pass --update to commit on top of them, or choose another name"
    ]
    assert updated.returncode == 0, updated.stderr
    assert on_hub(hub, "org/name", "v2") == on_hub(hub, "org/name") == contents(second, "org/name")
    assert same_tag.stderr.strip() == "error: org/name has the tag v1 already: choose another"

    expected = []
    for folder in (first, second, first):
        weights = load_file(folder / "model.safetensors")
        fc1 = next(weight for name, weight in weights.items() if "layer.0.intermediate" in name and weight.ndim == 2)
        expected.append(["transformers.models.vit.modeling_vit", 32.0, pytest.approx(float(fc1.sum()), abs=1e-5), 0.5])
    shas = {tag: repo.refs[tag] for tag in ("v1", "v2")}
    assert loaded(hub, tmp_path / "first", "org/name", ["v1", "main", shas["v1"]]) == expected
    (refused,) = loaded(hub, tmp_path / "second", "org/name", ["v1"], token="hf_stranger")
    assert "gated repo" in refused or "restricted" in refused


def test_an_interrupted_upload_goes_on_and_sends_nothing_twice(hub, tmp_path):
    folder = release_encoder(tmp_path / "release")
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, of in parts.items():
        save_file({name: weights[name] for name in of}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, of in parts.items() for name in of}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    words = ["release", folder, "org/name", "--push", "--no-verify", "--write-fingerprint"]
    # The server fails once at an upload, which the client tries again; then the commit fails, which it does not.
    hub.failures += [Failure("PUT", "/uploads/*"), Failure("POST", "*/commit/main")]
    (failed,) = run_commands(hub, tmp_path, words)
    assert failed.returncode == 1
    assert lines_of(failed.stderr)[-1] == (
        "error: the Hub answered 500 for org/name (it was ordered to fail); the same command goes on, and what has arrived is "
        "not sent again"
    )
    assert on_hub(hub, "org/name") == {} and len(hub.received) == 2
    assert hub.model("org/name").private

    (finished,) = run_commands(hub, tmp_path, words)
    assert finished.returncode == 0, finished.stderr
    assert on_hub(hub, "org/name") == contents(folder, "org/name")
    assert sorted(hub.received) == sorted({(oid, len(data)) for oid, data in hub.large.items()})  # each once


def test_a_connection_that_is_cut_in_the_middle_of_a_file_is_taken_up_again(hub, tmp_path):
    folder = release_encoder(tmp_path / "release")
    hub.failures.append(Failure("PUT", "/uploads/*", status=0, received=5000))
    (finished,) = run_commands(hub, tmp_path, ["release", folder, "org/name", "--push", "--no-verify"])
    assert finished.returncode == 0, finished.stderr
    assert on_hub(hub, "org/name") == contents(folder, "org/name")
    assert len(hub.received) == 1 and hub.count("PUT", "/uploads/*") == 2


def test_files_of_an_earlier_version_do_not_stay_behind(hub, tmp_path):
    folder = release_encoder(tmp_path / "release")
    old = {"model.safetensors.index.json": b"{}", "modeling_old.py": b"", "CHANGES.md": b"mine", "config.json": b"{}"}
    hub.create("models", "org/name", old)
    (finished,) = run_commands(hub, tmp_path, ["release", folder, "org/name", "--push", "--update", "--no-verify"])
    assert finished.returncode == 0, finished.stderr
    assert "taken away, since this release has none: modeling_old.py" in finished.stdout
    assert on_hub(hub, "org/name") == {**contents(folder, "org/name"), "CHANGES.md": b"mine"}


def test_what_must_not_go_up_does_not(hub, tmp_path):
    leaking = release_encoder(tmp_path / "leaking", card=CARD + "Trained on /home/mueller/S19-12345.svs\n")
    broken = release_encoder(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["layernorm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    foreign = release_hierarchy(tmp_path / "foreign")
    (foreign / "README.md").write_text(CARD)
    (foreign / "trunk.py").write_text((foreign / "trunk.py").read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    leaks, breaks, runs, allowed = run_commands(
        hub,
        tmp_path,
        ["release", leaking, "org/name", "--push"],
        ["release", broken, "org/name", "--push"],
        ["release", foreign, "org/name", "--push"],
        ["release", leaking, "org/name", "--allow", "S19-12345*", "--allow", "/home/mueller"],
    )
    assert not any(method in ("POST", "PUT") for method, _, _ in hub.requests) and hub.repos == {}
    assert leaks.stderr.strip() == "error: nothing was sent: patients fails, see above"
    assert "error: README.md: what looks like an accession number: S19-12345" in leaks.stdout
    assert "error: README.md: a path with the name of a user: /home/mueller" in leaks.stdout
    assert breaks.stderr.strip() == "error: nothing was sent: fingerprint fails, see above"
    assert "weights that are not finite: layernorm.weight" in breaks.stdout
    assert runs.stderr.strip() == "error: nothing was sent: code, fingerprint fail, see above"
    assert "trunk.py: code that is not this package's: look at it, and pass --trust-remote-code" in runs.stdout
    assert not (tmp_path / "ran").exists()
    assert allowed.returncode == 0 and "(allowed)" in allowed.stdout


@pytest.mark.slow
def test_a_hierarchy_is_released_with_its_code(hub, tmp_path):
    folder = release_hierarchy(tmp_path / "release")
    (folder / "README.md").write_text(CARD)
    (finished,) = run_commands(hub, tmp_path, ["release", folder, "org/hipt", "--push", "--tag", "v1"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert on_hub(hub, "org/hipt", "v1") == contents(folder, "org/hipt")
    assert "6 files of this package" in finished.stdout


# What a user may get wrong.


def test_a_mistake_is_told_in_one_line_before_anything_is_loaded(hub, tmp_path):
    folder = release_encoder(tmp_path / "release")
    bad = {
        "name": "name has no owner",
        "a b/c": "a b/c cannot be the id of a repository",
        "a/b/c": "a/b/c cannot be the id of a repository",
    }
    ran = run_commands(
        hub, tmp_path, *(["release", folder, name, "--push"] for name in bad), ["release", tmp_path / "x", "org/name"]
    )
    for finished, message in zip(ran, [*bad.values(), f"{tmp_path / 'x'} is no folder"]):
        assert finished.returncode == 1 and finished.stderr.startswith(f"error: {message}")
        assert len(lines_of(finished.stderr)) == 1
    (nobody,) = run_commands(hub, tmp_path, ["release", folder, "org/name", "--push"], token=None)
    assert nobody.stderr.startswith("error: nobody is logged in to the Hub: run `hf auth login`")
    (offline,) = run_commands(hub, tmp_path, ["release", folder, "org/name", "--push"], HF_HUB_OFFLINE="1")
    assert offline.stderr.strip() == "error: HF_HUB_OFFLINE is set, so that nothing can be pushed: unset it"
    assert hub.requests == []


def test_a_refusal_of_the_hub_is_told_in_one_line(hub, tmp_path):
    folder = release_encoder(tmp_path / "release")
    words = ["release", folder, "org/name", "--push"]
    hub.refused.add("hf_old")
    (old,) = run_commands(hub, tmp_path, words, token="hf_old")
    assert lines_of(old.stderr) == ["error: the Hub does not know the token: run `hf auth login` again"]
    hub.read_only.add("org")
    (forbidden,) = run_commands(hub, tmp_path, words)
    assert lines_of(forbidden.stderr)[0].startswith(
        "error: this token may not write to org/name: log in with one that may"
    )


def test_without_a_network_the_hub_is_said_not_to_be_reached(tmp_path):
    folder = release_encoder(tmp_path / "release")
    with loopback_hub() as gone:
        pass
    pushed, dry = run_commands(
        gone, tmp_path, ["release", folder, "org/name", "--push"], ["release", folder, "org/name"]
    )
    assert pushed.returncode == 1 and len(lines_of(pushed.stderr)) == 1
    assert pushed.stderr.startswith(f"error: the Hub at {gone.address} cannot be reached")
    assert dry.returncode == 0 and "cannot be reached" in dry.stdout


# Datasets.


def bag(slide: str, tiles: int) -> SlideFeatures:
    rng = np.random.default_rng(tiles)
    features, xy = rng.normal(size=(tiles, 7)).astype(np.float32), rng.integers(0, 2**20, (tiles, 2))
    return SlideFeatures(
        slide, "e", "r", "cls", 224, 0.5, (448.0, 448.0), (9000, 9000), features, xy, np.full(tiles, True)
    )


LOAD_BAGS = """
import sys
from datasets import load_dataset
from hf_pathology.features.store import features_path
from hf_pathology.features.tables import from_dataset
for bag in from_dataset(load_dataset("org/bags", split="train", revision="v1")):
    bag.save(features_path(sys.argv[1], bag.slide))
"""


def test_features_are_released_as_a_dataset_that_gives_them_back_bit_by_bit(hub, tmp_path):
    for each in (bag("a.svs", 9), bag("b.svs", 5)):
        each.save(features_path(tmp_path / "features", each.slide))
    bag("S19-12345.svs", 4).save(features_path(tmp_path / "named", "S19-12345.svs"))
    pushed, leaks = run_commands(
        hub,
        tmp_path,
        ["release", tmp_path / "features", "org/bags", "--push", "--tag", "v1", "--per", "tile"],
        ["release", tmp_path / "named", "org/named", "--push"],
    )
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    assert "train has encoder, extent, feature" in pushed.stdout and "every byte the same" in pushed.stdout
    files = hub.dataset("org/bags").files
    assert set(files) == {".gitattributes", "README.md", "data/train-00000-of-00001.parquet"}
    assert b'load_dataset("org/bags"' in files["README.md"] and b"PATH_OR_ID" not in files["README.md"]
    assert leaks.stderr.strip() == "error: nothing was sent: patients fails, see above"
    assert "data/train-00000-of-00001.parquet: what looks like an accession number" in leaks.stdout

    ran = run_python(hub, tmp_path, "-c", LOAD_BAGS, tmp_path / "back")
    assert ran.returncode == 0, ran.stderr
    for found, known in zip(saved_bags(tmp_path / "back"), saved_bags(tmp_path / "features"), strict=True):
        assert found.slide == known.slide and np.array_equal(found.xy, known.xy)
        assert found.features.tobytes() == known.features.tobytes()
