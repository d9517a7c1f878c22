"""The Hub as a release needs it: what is there, one commit, a tag; every failure as one line that says what to do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    ModelCard,
    constants,
    get_token,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.release_files import Contents, Kind, belongs


OF_THE_HUB = {".gitattributes"}  # what a new repository has


@dataclass(frozen=True)
class Target:
    """Where a release goes.

    Attributes:
        repo_id: OWNER/NAME.
        private: None for a new repository that is private, or one that stays as it is.
        gated: "auto", "manual" or "no"; None leaves it as it is.
        tag: of the commit.
        update: whether the repository may hold something already.
    """

    repo_id: str
    private: bool | None = None
    gated: str | None = None
    tag: str | None = None
    update: bool = False

    def __post_init__(self) -> None:
        check_repo_id(self.repo_id)
        if self.gated not in (None, "auto", "manual", "no"):
            raise UserError(f"gated is {self.gated!r}: it is auto, manual or no")
        if self.tag is not None and (not self.tag.strip() or set(self.tag) & set(" ~^:?*[\\") or ".." in self.tag):
            raise UserError(f"{self.tag!r} cannot be a tag: choose a name such as v1.0")


@dataclass(frozen=True)
class Repository:
    """What is there at the time.

    Attributes:
        exists: whether this user can see it.
        head: its last commit.
        files: in that commit.
        tags: that it has.
    """

    exists: bool
    head: str | None = None
    files: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing yet, as after a first push that was interrupted."""
        return not self.files - OF_THE_HUB

    def stale(self, contents: Contents) -> list[str]:
        """The files of an earlier release that the new one lacks: old shards would be loaded in the place of the new ones."""
        return sorted(path for path in self.files if path not in contents and belongs(path, contents.kind))


def check_repo_id(repo_id: str) -> None:
    """Raises UserError for what cannot be the id of a repository, with its owner."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{repo_id} cannot be the id of a repository ({first_line(error)}): pass OWNER/NAME"
        ) from error
    if "/" not in repo_id:
        raise UserError(f"{repo_id} has no owner: pass OWNER/NAME, your user name or an organization's and the name")


def check_login() -> None:
    """Raises UserError when this machine may not or cannot push."""
    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so that nothing can be pushed: unset it")
    if not get_token():
        raise UserError(
            "nobody is logged in to the Hub: run `hf auth login` with a token that may write, or set HF_TOKEN"
        )


def look_at(repo_id: str, kind: Kind) -> Repository:
    """What the Hub has under that id."""
    with one_line(repo_id):
        try:
            info = HfApi().repo_info(repo_id, repo_type=kind)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Repository(exists=False)
        refs = HfApi().list_repo_refs(repo_id, repo_type=kind)
    files = frozenset(each.rfilename for each in info.siblings or [])
    return Repository(True, info.sha, files, frozenset(tag.name for tag in refs.tags))


def validate_card(repo_id: str, contents: Contents) -> None:
    """Raises UserError when the Hub does not take the card's metadata."""
    source = contents["README.md"].source
    card = ModelCard if contents.kind == "model" else DatasetCard
    with one_line(repo_id):
        try:
            card(
                source.decode("utf-8") if isinstance(source, bytes) else source.read_text(encoding="utf-8")
            ).validate()
        except HfHubHTTPError:
            raise
        except ValueError as error:
            raise UserError(f"the Hub does not take README.md: {messages_in(str(error))}") from error


def messages_in(answer: str) -> str:
    """What the Hub says of a card, which it sends as JSON or as text."""
    try:
        return "; ".join(each["message"] for each in json.loads(answer)["errors"])
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.split())


def create(repo_id: str, kind: Kind) -> None:
    """Makes the repository, private; gates and visibility are set when it is time."""
    with one_line(repo_id):
        HfApi().create_repo(repo_id, repo_type=kind, private=True)


def change_settings(repo_id: str, kind: Kind, *, private: bool | None = None, gated: str | None = None) -> None:
    """Changes who may see the repository ("no" for no gate); None leaves it as it is."""
    gate = {"no": False}.get(gated, gated)
    if private is None and gate is None:
        return
    with one_line(repo_id):
        HfApi().update_repo_settings(repo_id, repo_type=kind, private=private, gated=gate)


def commit(repo_id: str, contents: Contents, found: Repository, message: str) -> str:
    """Sends everything in one commit on top of what was `found`, and returns its hash.

    Not `upload_folder`, which makes several commits where Xet is installed: what is visible would be half a release. Large files
    that arrived before are not sent again, by LFS as by Xet.
    """
    source = {file.path: file.source for file in contents.files}
    operations = [
        CommitOperationAdd(path, data if isinstance(data, bytes) else str(data)) for path, data in source.items()
    ]
    operations += [CommitOperationDelete(path) for path in found.stale(contents)]
    with one_line(repo_id, sending=True):
        done = HfApi().create_commit(
            repo_id, operations, repo_type=contents.kind, commit_message=message, parent_commit=found.head
        )
    return done.oid


def set_tag(repo_id: str, kind: Kind, tag: str, revision: str) -> None:
    """Names the commit."""
    with one_line(repo_id):
        HfApi().create_tag(repo_id, repo_type=kind, tag=tag, revision=revision)


@contextmanager
def one_line(repo_id: str, sending: bool = False) -> Iterator[None]:
    """Turns what the client says of the Hub into a UserError of one line."""
    again = "; the same command goes on, and what has arrived is not sent again" if sending else ""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so that the Hub cannot be asked: unset it") from error
    except LocalTokenNotFoundError as error:
        raise UserError("nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise UserError(said_by_hub(repo_id, error) + again) from error
    except HTTPError as error:
        raise UserError(f"the Hub at {constants.ENDPOINT} cannot be reached ({first_line(error)}){again}") from error
    except RuntimeError as error:  # how the client wraps what happened to one of several large files
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise UserError(f"{first_line(error)} {said_by_hub(repo_id, cause)}{again}") from error
        raise UserError(f"{first_line(error)} {first_line(cause or error)}{again}") from error
    except UserError:
        raise
    except ValueError as error:  # how the client says that the Hub does not take a file
        raise UserError(f"the Hub refuses {repo_id}: {' '.join(str(error).split())}") from error


def said_by_hub(repo_id: str, error: HfHubHTTPError) -> str:
    """A refusal of the Hub, with its remedy."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: ask for access at {constants.ENDPOINT}/{repo_id}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} is not on the Hub, or private: check the id, and who is logged in (`hf auth whoami`)"
    if status == 401:
        return "the Hub does not know the token: run `hf auth login` again"
    if status == 403:
        return f"this token may not write to {repo_id}: log in with one that may (`hf auth login`), or ask the owner"
    if status == 409:
        return f"{repo_id} exists on the Hub, or the tag does: pass --update, or choose another name"
    if status == 412:
        return f"{repo_id} has changed on the Hub in the meantime: look at it, and run the command again"
    return f"the Hub answered {status} for {repo_id} ({error.server_message or first_line(error)})"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
