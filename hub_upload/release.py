"""A release: what goes up is checked, sent in one commit, tagged, and downloaded again to see that it is the same.

Models are only loaded in processes of their own, so that this one needs neither torch nor transformers.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from hf_pathology.errors import UserError
from hf_pathology.hub_upload import hub
from hf_pathology.hub_upload.card_check import check_card
from hf_pathology.hub_upload.carried_code import foreign_code
from hf_pathology.hub_upload.clean_process import verify_in_clean_process
from hf_pathology.hub_upload.hub import Repository, Target
from hf_pathology.hub_upload.identifiers import Finding, allow
from hf_pathology.hub_upload.patient_data import search_file
from hf_pathology.hub_upload.release_files import FINGERPRINT, Contents


@dataclass
class Check:
    """What one way of looking at a release has found.

    Attributes:
        name: of the check.
        passed: what is good, in words.
        findings: what is not, or is worth knowing.
    """

    name: str
    passed: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def fails(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


def check(contents: Contents, *, allowed: list[str], trust_remote_code: bool) -> list[Check]:
    """All checks that need no network, of exactly the files that would go up."""
    card = Check("card", "has its metadata, and says under which licence", check_card(contents))
    files = [finding for file in contents.files for finding in search_file(file.path, file.source)]
    patients = Check("patients", f"nothing that leads to a patient or a user in {len(contents.files)} files", files)
    patients.findings = allow(patients.findings, allowed)
    if contents.kind == "dataset":
        return [check_dataset(contents), card, patients]
    return [check_code(contents, trust_remote_code), check_model(contents, trust_remote_code), card, patients]


def check_code(contents: Contents, trust_remote_code: bool) -> Check:
    """Code goes up, and is run here, when it is this package's own or the user has typed so."""
    foreign = foreign_code(contents)
    count = sum(file.path.endswith(".py") for file in contents.files)
    passed = "none" if not count else f"{count} files of this package" if not foreign else "trusted by you"
    what = "code that is not this package's: look at it, and pass --trust-remote-code"
    return Check("code", passed, [] if trust_remote_code else [Finding("error", path, what) for path in foreign])


def check_model(contents: Contents, trust_remote_code: bool) -> Check:
    """It loads whole where this package is not installed, has finite weights, and gives the features of its fingerprint."""
    if "config.json" not in contents:
        return check_adapter(contents)
    if FINGERPRINT not in contents:
        what = "there is none: write the release anew, or add it with `hf-pathology release DIR REPO_ID --write-fingerprint`"
        return Check("fingerprint", "", [Finding("error", FINGERPRINT, what)])
    foreign = foreign_code(contents)
    if foreign and not trust_remote_code:
        return Check("fingerprint", "", [Finding("error", foreign[0], "not run, so nothing is known of the model")])
    trusts = any(file.path.endswith(".py") for file in contents.files)
    try:
        with laid_out(contents) as folder:
            return Check("fingerprint", verify_in_clean_process(folder, trust_remote_code=trusts))
    except UserError as error:
        return Check("fingerprint", "", [Finding("error", FINGERPRINT, str(error).replace(f"{folder} ", "it "))])


def check_adapter(contents: Contents) -> Check:
    """An adapter gives what its base model makes of it: the base must be on the Hub, and the weights finite."""
    from safetensors.torch import load_file

    with laid_out(contents) as folder:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        weights = [load_file(path) for path in folder.glob("*.safetensors")]
    findings = []
    if not base or Path(base).exists() or base.count("/") != 1:
        what = "the adapter's base model is not on the Hub: release it first, and name it as base_model_name_or_path"
        findings.append(Finding("error", "adapter_config.json", what, base or ""))
    broken = [name for part in weights for name, weight in part.items() if not weight.isfinite().all()]
    if broken:
        findings.append(Finding("error", "adapter", f"it has weights that are not finite: {', '.join(broken[:5])}"))
    return Check("adapter", f"of {base}, with finite weights; it has no fingerprint of its own", findings)


def check_dataset(contents: Contents) -> Check:
    """`datasets` finds its rows by the card."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with laid_out(contents) as folder:
            splits = load_dataset(str(folder), streaming=True)
            row = {split: sorted(next(iter(rows))) for split, rows in splits.items()}
    except (DatasetsError, ValueError, OSError, StopIteration, TypeError) as error:
        return Check("datasets", "", [Finding("error", "data", f"datasets cannot load it ({hub.first_line(error)})")])
    return Check("datasets", "; ".join(f"{split} has {', '.join(columns)}" for split, columns in row.items()))


@contextmanager
def laid_out(contents: Contents) -> Iterator[Path]:
    """A folder with exactly the files that would go up, as links."""
    with tempfile.TemporaryDirectory() as temporary:
        for file in contents.files:
            path = Path(temporary) / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file.source, bytes):
                path.write_bytes(file.source)
            else:
                path.symlink_to(file.source.resolve())
        yield Path(temporary)


def plan(contents: Contents, target: Target) -> Repository:
    """What the Hub has now. Raises UserError when the release cannot go there."""
    found = hub.look_at(target.repo_id, contents.kind)
    if found.exists and not found.is_empty and not target.update:
        raise UserError(
            f"{target.repo_id} exists on the Hub, with {len(found.files)} files: pass --update to commit on top of them, or "
            "choose another name"
        )
    if target.tag in found.tags:
        raise UserError(f"{target.repo_id} has the tag {target.tag} already: choose another")
    return found


def push(contents: Contents, target: Target, found: Repository, *, verify: bool, say: Callable[[str], None]) -> str:
    """Sends the release and returns its commit. Nobody sees a new repository before its gate is set and its content is verified.

    Raises UserError when the Hub refuses, is not reached, or gives other bytes back.
    """
    where, kind = target.repo_id, contents.kind
    hub.validate_card(where, contents)
    if not found.exists:
        hub.create(where, kind)
        say(f"made {where}, private")
        found = hub.look_at(where, kind)
    hub.change_settings(where, kind, gated=target.gated)
    size = sum(file.size for file in contents.files)
    say(f"sending {len(contents.files)} files, {size / 1e6:,.1f} MB")
    message = f"Release {target.tag}" if target.tag else "Release"
    revision = hub.commit(where, contents, found, message)
    say(f"commit {revision}")
    if target.tag:
        hub.set_tag(where, kind, target.tag, revision)
        say(f"tag {target.tag}")
    if verify:
        say(verify_pushed(contents, target, revision))
    if target.private is not None:
        hub.change_settings(where, kind, private=target.private)
        say("private" if target.private else "public from now on")
    return revision


def verify_pushed(contents: Contents, target: Target, revision: str) -> str:
    """Downloads the tag, or the commit, into an empty cache, and compares every byte and the fingerprint; says so.

    Raises UserError for the first difference.
    """
    asked = {"repo_type": contents.kind, "revision": target.tag or revision}
    with tempfile.TemporaryDirectory() as cache:
        if contents.kind == "dataset":  # file by file, since a dataset may fill a disk
            for file in contents.files:
                with tempfile.TemporaryDirectory() as one, hub.one_line(target.repo_id):
                    compare(
                        file.sha256,
                        Path(hf_hub_download(target.repo_id, file.path, cache_dir=one, **asked)),
                        file.path,
                    )
            return f"downloaded again: {len(contents.files)} files, every byte the same"
        with hub.one_line(target.repo_id):
            folder = Path(snapshot_download(target.repo_id, cache_dir=cache, **asked))
        for file in contents.files:
            compare(file.sha256, folder / file.path, file.path)
        if "config.json" not in contents:  # an adapter
            return f"downloaded again: {len(contents.files)} files, every byte the same"
        trusts = any(file.path.endswith(".py") for file in contents.files)
        agreement = verify_in_clean_process(folder, trust_remote_code=trusts)
    return f"downloaded again: {len(contents.files)} files, every byte the same; {agreement}"


def compare(sha256: str, path: Path, name: str) -> None:
    """Raises UserError when a downloaded file is not the one that was sent."""
    if not path.is_file():
        raise UserError(f"{name} did not come back from the Hub")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise UserError(f"{name} came back from the Hub with other bytes: do not use this commit")
