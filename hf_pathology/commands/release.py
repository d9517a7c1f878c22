"""`hf-pathology release`: says what would go to the Hub and checks it; with `--push`, sends it and looks at what came of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import UserError
from ..hub_upload.hub import Repository, Target, check_login
from ..hub_upload.release import Check, check, plan, push
from ..hub_upload.release_files import Contents, contents_of, holds_features


SHOWN = 20  # findings of a check that are printed


def release(
    *,
    directory: Path,
    target: Target,
    push_it: bool,
    include: list[str],
    allowed: list[str],
    trust_remote_code: bool,
    with_training: bool,
    fingerprint: bool,
    per: str,
    verify: bool,
) -> int:
    """Checks the release, and pushes it when that was asked for; returns the exit code."""
    if fingerprint:
        write_missing_fingerprint(directory, trust_remote_code)
    with dataset_or_folder(directory, per) as folder, record_of_training(directory, with_training) as more:
        contents = contents_of(folder, target.repo_id, include, more)
        show_files(contents)
        found = plan(contents, target) if push_it else None
        checks = check(contents, allowed=allowed, trust_remote_code=trust_remote_code)
        show_checks(checks)
        failed = [each.name for each in checks if each.fails]
        if push_it and failed:
            raise UserError(
                f"nothing was sent: {', '.join(failed)} {'fails' if len(failed) == 1 else 'fail'}, see above"
            )
        if found is None:
            show_plan(contents, target)
            return 1 if failed else 0
        show_stale(contents, found)
        revision = push(contents, target, found, verify=verify, say=print)
    place = f"datasets/{target.repo_id}" if contents.kind == "dataset" else target.repo_id
    print(f"released: {place} at {target.tag or revision}")
    return 0


def write_missing_fingerprint(directory: Path, trust_remote_code: bool) -> None:
    """Writes the fingerprint of a model that another program saved. Raises UserError when it does not load."""
    from ..hub_upload.export import write_fingerprint

    try:
        write_fingerprint(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{directory} has no fingerprint: {str(error).splitlines()[0]}") from error


@contextmanager
def dataset_or_folder(directory: Path, per: str) -> Iterator[Path]:
    """The folder to release: of features the dataset that is made of them, any other itself."""
    if (directory / "config.json").is_file() or not holds_features(directory):
        yield directory
        return
    from ..hub_upload.feature_dataset import feature_dataset

    with feature_dataset(directory, per) as made:
        yield made


@contextmanager
def record_of_training(encoder: Path, asked: bool) -> Iterator[dict[str, Path | bytes]]:
    """The files, by their path in a repository, that tell how the run in which `encoder` lies was trained."""
    if not asked:
        yield {}
        return
    from ..hub_upload.training_record import FOLDER, read_card, with_training_record, write_training_record

    if not (encoder / "config.json").is_file():
        raise UserError(f"{encoder} is no encoder of a run: leave out --with-training")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_training_record(encoder.resolve().parent, folder)
        files = {f"{FOLDER}/{file.name}": file for file in folder.iterdir()}
        yield {**files, "README.md": with_training_record(read_card(encoder), folder).encode()}


def show_files(contents: Contents) -> None:
    """Prints every file that would go up, then those that would not."""
    print(f"{contents.kind}: {len(contents.files)} files, {sum(file.size for file in contents.files):,} bytes")
    for file in contents.files:
        print(f"  {file.size:>15,}  {'LFS' if file.is_large else 'git'}  {file.sha256}  {file.path}")
    if contents.left:
        print(f"not pushed: {len(contents.left)} files (--include PATTERN adds them)")
        for path, reason in list(contents.left.items())[:SHOWN]:
            print(f"  {path}: {reason}")


def show_checks(checks: list[Check]) -> None:
    """Prints what every check says, errors first."""
    for each in checks:
        print(f"{'fails' if each.fails else 'ok   '}  {each.name}{'' if each.fails else f': {each.passed}'}")
        findings = sorted(each.findings, key=lambda finding: finding.severity)
        for finding in findings[:SHOWN]:
            print(f"       {finding.severity}: {finding}")
        if len(findings) > SHOWN:
            print(f"       and {len(findings) - SHOWN} more")
    if any(each.name == "patients" and each.fails for each in checks):
        print("       --allow TEXT lets a finding pass that you have looked at; * stands for anything")


def show_plan(contents: Contents, target: Target) -> None:
    """Prints what a push would do, as far as the Hub can be asked."""
    try:
        check_login()
        found = plan(contents, target)
        do = "commit on top of what is there" if found.exists else "make the repository, private, and commit"
        show_stale(contents, found)
    except UserError as error:
        do = f"commit, but for now: {error}"
    gate = f", gate {target.gated}" if target.gated else ""
    tag = f", tag {target.tag}" if target.tag else ""
    seen = {None: "", True: ", make it private", False: ", make it public once it is verified"}[target.private]
    print(f"{target.repo_id}: would {do}{gate}{tag}{seen}")
    print("dry run: nothing was sent; --push sends it")


def show_stale(contents: Contents, found: Repository) -> None:
    for path in found.stale(contents):
        print(f"  taken away, since this release has none: {path}")
