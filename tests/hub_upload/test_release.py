"""`hf-pathology release` against a Hub on this machine, in processes of their own, through the unmodified client."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hierarchies import release_hierarchy
from loopback_hub import TOKEN, Failure, LoopbackHub, loopback_hub
from releases import CARD, release_encoder, run_commands, run_python
from safetensors.torch import load_file, save_file

from hf_pathology.features.store import SlideFeatures, features_path
from hf_pathology.features.tables import saved_bags
from hf_pathology.hub_upload.export import write_fingerprint


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
for revision, token in json.loads(sys.argv[1]):
    asked = {"revision": revision, "token": token}
    try:
        model = AutoModel.from_pretrained("org/name", **asked)
        processor = AutoImageProcessor.from_pretrained("org/name", **asked)
        weight = model.layers[0].mlp.fc1.weight.detach()
        print(json.dumps([type(model).__module__, processor.mpp, weight.flatten()[:3].tolist()]))
    except OSError as error:
        print(json.dumps(str(error)))
"""


def loaded(hub: LoopbackHub, home: Path, *asked: tuple[str, str]) -> list:
    """What a process without any help of ours loads of these revisions, with these tokens."""
    ran = run_python(hub, home, "-I", "-c", LOAD, json.dumps(asked))
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in lines_of(ran.stdout)]


def facts_of(folder: Path) -> list:
    """What `loaded` is to find of that release."""
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if "layer.0." in name and name.endswith("intermediate.dense.weight"))
    return ["transformers.models.vit.modeling_vit", 0.5, weights[name].flatten()[:3].tolist()]


def test_a_release_is_sent_tagged_verified_and_loaded_by_plain_transformers(hub, tmp_path):
    folder = release_encoder(tmp_path / "release")
    pushed, again = run_commands(
        hub,
        tmp_path,
        ["release", folder, "org/name", "--push", "--tag", "v1", "--public", "--gated", "manual"],
        ["release", folder, "org/name", "--push"],
    )
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    sent = contents(folder, "org/name")
    assert on_hub(hub, "org/name", "v1") == sent
    for name, data in sent.items():
        way = "LFS" if name.endswith(".safetensors") else "git"
        assert f"  {len(data):>15,}  {way}  {hashlib.sha256(data).hexdigest()}  {name}" in lines_of(pushed.stdout)
    repo = hub.model("org/name")
    assert (repo.private, repo.gated, len(repo.commits)) == (False, "manual", 2)  # the first is the Hub's own

    # It was private until its gate was set and it was downloaded again.
    order = [f"{method} {path}" for method, path, _ in hub.requests]
    settings = [place for place, request in enumerate(order) if request == "PUT /api/models/org/name/settings"]
    upload, commit = (order.index(next(each for each in order if part in each)) for part in ("/uploads/", "/commit/"))
    back = order.index(f"GET /org/name/resolve/{repo.refs['v1']}/model.safetensors")
    assert settings[0] < upload < commit < back < settings[1]
    assert "every byte the same; loads whole, and its features are the same" in pushed.stdout

    assert again.returncode == 1
    assert lines_of(again.stderr) == [
        "error: org/name exists on the Hub, with 6 files: pass --update to commit on top of them, or choose another name"
    ]
    assert loaded(hub, tmp_path, ("v1", TOKEN)) == [facts_of(folder)]


def test_revisions_are_pinned_and_strangers_are_refused_at_a_gate(hub, tmp_path):
    first, second = release_encoder(tmp_path / "first"), release_encoder(tmp_path / "second", seed=1)
    repo = hub.create("models", "org/name", contents(first, "org/name"), gated="auto")
    repo.refs["v1"] = repo.refs["main"]
    repo.commit(contents(second, "org/name"))
    asked = [("v1", TOKEN), ("main", TOKEN), (repo.refs["v1"], TOKEN), ("v9", TOKEN), ("main", "hf_stranger")]
    *versions, missing, refused = loaded(hub, tmp_path, *asked)
    assert versions == [facts_of(first), facts_of(second), facts_of(first)]
    assert "v9 is not a valid git identifier" in missing
    assert "gated repo" in refused


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
    write_fingerprint(folder)

    # One upload fails, another is cut in the middle: the client tries again. Then the commit fails, which it does not try again.
    hub.failures += [Failure("PUT", "/uploads/*"), Failure("PUT", "/uploads/*", status=0, received=5000)]
    hub.failures += [Failure("POST", "*/commit/main")]
    words = ["release", folder, "org/name", "--push", "--no-verify"]
    failed, finished = run_commands(hub, tmp_path, words, words)
    assert failed.returncode == 1
    assert lines_of(failed.stderr)[-1] == (
        "error: the Hub answered 500 for org/name (it was ordered to fail); the same command goes on, and what has arrived is "
        "not sent again"
    )
    assert finished.returncode == 0, finished.stderr
    assert on_hub(hub, "org/name") == contents(folder, "org/name") and hub.model("org/name").private
    assert len(hub.model("org/name").commits) == 2  # and no half of it was ever there
    assert hub.count("PUT", "/uploads/*") == 4 and hub.count("POST", "*/commit/main") == 2
    assert sorted(hub.received) == sorted((oid, len(data)) for oid, data in hub.large.items())  # each once


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_done_and_does_none_of_it(hub, tmp_path):
    folder = release_encoder(tmp_path / "release")
    hub.create("models", "org/old", {"modeling_old.py": b""})
    new, old, alone = run_commands(
        hub,
        tmp_path,
        ["release", folder, "org/name", "--tag", "v1", "--public", "--gated", "auto"],
        ["release", folder, "org/old", "--update"],
        ["HF_TOKEN=", "release", folder, "org/name"],
    )
    assert [ran.returncode for ran in (new, old, alone)] == [0, 0, 0]
    for ran in (new, old, alone):
        assert lines_of(ran.stdout)[-1] == "dry run: nothing was sent; --push sends it"
    assert (
        "org/name: would make the repository, private, and commit, gate auto, tag v1, make it public once it is verified"
        in lines_of(new.stdout)
    )
    assert "  taken away, since this release has none: modeling_old.py" in lines_of(old.stdout)
    assert "org/old: would commit on top of what is there" in lines_of(old.stdout)
    assert "org/name: would commit, but for now: nobody is logged in" in alone.stdout
    assert {method for method, _, _ in hub.requests} == {"GET"}


@pytest.mark.slow
def test_a_card_that_the_hub_does_not_take_is_refused_before_anything_is_made(hub, tmp_path):
    folder = release_encoder(tmp_path / "release", card=CARD.replace("library_name", "license: wrong\nlibrary_name"))
    (refused,) = run_commands(hub, tmp_path, ["release", folder, "org/name", "--push"])
    assert refused.returncode == 1 and hub.repos == {}
    assert refused.stderr.strip() == 'error: the Hub does not take README.md: "license" must be one of a list'


@pytest.mark.slow
def test_files_of_an_earlier_version_do_not_stay_behind(hub, tmp_path):
    folder = release_encoder(tmp_path / "release")
    old = {"model.safetensors.index.json": b"{}", "modeling_old.py": b"", "CHANGES.md": b"mine", "config.json": b"{}"}
    hub.create("models", "org/name", old)
    words = ["--push", "--update", "--no-verify", "--tag", "v1"]
    finished, again = run_commands(
        hub, tmp_path, ["release", folder, "org/name", *words], ["release", folder, "org/name", *words]
    )
    assert finished.returncode == 0, finished.stderr
    assert "taken away, since this release has none: modeling_old.py" in finished.stdout
    assert on_hub(hub, "org/name") == {**contents(folder, "org/name"), "CHANGES.md": b"mine"}
    assert again.stderr.strip() == "error: org/name has the tag v1 already: choose another"


def test_what_must_not_go_up_does_not(hub, tmp_path):
    bad = release_encoder(tmp_path / "bad", card=CARD + "Trained on /home/mueller/S19-12345.svs\n")
    weights = load_file(bad / "model.safetensors")
    weights["layernorm.weight"][0] = float("nan")
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    foreign = release_hierarchy(tmp_path / "foreign")
    (foreign / "README.md").write_text(CARD)
    (foreign / "trunk.py").write_text((foreign / "trunk.py").read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    leaks, runs = run_commands(
        hub, tmp_path, ["release", bad, "org/name", "--push"], ["release", foreign, "org/name", "--push"]
    )
    assert {method for method, _, _ in hub.requests} == {"GET"} and hub.repos == {}
    assert leaks.stderr.strip() == "error: nothing was sent: fingerprint, patients fail, see above"
    assert "error: README.md: what looks like an accession number: S19-12345" in leaks.stdout
    assert "error: README.md: a path with the name of a user: /home/mueller" in leaks.stdout
    assert "weights that are not finite: layernorm.weight" in leaks.stdout
    assert "trunk.py: code that is not this package's: look at it, and pass --trust-remote-code" in runs.stdout
    assert runs.stderr.startswith("error: nothing was sent: code, fingerprint") and not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_hierarchy_is_released_with_its_code(hub, tmp_path):
    folder = release_hierarchy(tmp_path / "release")
    (folder / "README.md").write_text(CARD)
    (finished,) = run_commands(hub, tmp_path, ["release", folder, "org/hipt", "--push", "--tag", "v1"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert on_hub(hub, "org/hipt", "v1") == contents(folder, "org/hipt")
    assert "6 files of this package" in finished.stdout


# What a user may get wrong.


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["RELEASE", "name"], {}, "name has no owner"),
        (["RELEASE", "a b/c"], {}, "a b/c cannot be the id of a repository"),
        (["RELEASE", "a/b/c"], {}, "a/b/c cannot be the id of a repository"),
        (["RELEASE", "a/b", "--tag", "v 1"], {}, "'v 1' cannot be a tag"),
        (["RELEASE", "a/b", "--gated", "yes"], {}, "gated is 'yes': it is auto, manual or no"),
        (["RELEASE", "a/b", "--push"], {"HF_TOKEN": ""}, "nobody is logged in to the Hub: run `hf auth login`"),
        (
            ["RELEASE", "a/b", "--push"],
            {"HF_HUB_OFFLINE": "1"},
            "HF_HUB_OFFLINE is set, so that nothing can be pushed",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_loaded(hub, tmp_path, words, environment, message):
    ran = run_python(hub, tmp_path, "-X", "importtime", "-m", "hf_pathology", "release", *words, **environment)
    told = [line for line in lines_of(ran.stderr) if not line.startswith("import time:")]
    assert ran.returncode == 1 and len(told) == 1 and told[0].startswith(f"error: {message}")
    assert re.search(r"\|\s+typer$", ran.stderr, re.MULTILINE) and hub.requests == []
    assert not re.search(r"\|\s+(torch|transformers|pyarrow)$", ran.stderr, re.MULTILINE)


def test_a_refusal_of_the_hub_is_told_in_one_line(hub, tmp_path):
    words = ["release", release_encoder(tmp_path / "release"), "org/name", "--push"]
    hub.refused.add("hf_old")
    hub.read_only.add("org")
    hub.create("models", "owner/secret", private=True)
    old, secret, forbidden = run_commands(
        hub,
        tmp_path,
        ["HF_TOKEN=hf_old", *words],
        ["HF_TOKEN=hf_stranger", "release", tmp_path / "none", "owner/secret"],
        [f"HF_TOKEN={TOKEN}", *words],
    )
    assert lines_of(old.stderr) == ["error: the Hub does not know the token: run `hf auth login` again"]
    assert lines_of(secret.stderr)[0].startswith(f"error: {tmp_path / 'none'} is no folder: pass a release")
    assert lines_of(forbidden.stderr)[0].startswith(
        "error: this token may not write to org/name: log in with one that may"
    )
    assert len(lines_of(forbidden.stderr)) == 1


def test_without_a_network_the_hub_is_said_not_to_be_reached(tmp_path):
    folder = release_encoder(tmp_path / "release")
    with loopback_hub() as gone:
        pass
    (pushed,) = run_commands(gone, tmp_path, ["release", folder, "org/name", "--push"])
    assert pushed.returncode == 1 and len(lines_of(pushed.stderr)) == 1
    assert pushed.stderr.startswith(f"error: the Hub at {gone.address} cannot be reached")


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
