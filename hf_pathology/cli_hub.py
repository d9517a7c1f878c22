"""The verbs that bring models and datasets to the Hub."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def release(
    directory: Annotated[Path, typer.Argument(help="Release, head, folder of shards, or folder of features.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub.")],
    push: Annotated[bool, typer.Option("--push", help="Send it; without this, only say what would be sent.")] = False,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees it; default: private, or as it is.")
    ] = None,
    gated: Annotated[
        str | None, typer.Option("--gated", help="auto, manual or no: whether readers have to ask for access.")
    ] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="Name of this version, such as v1.0.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Commit on top of a repository that exists.")] = False,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Further files to push; may be repeated.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", help="Text or file of a finding that may pass; may be repeated.")
    ] = None,
    with_training: Annotated[
        bool, typer.Option("--with-training", help="Also the run's whole weights, log and options.")
    ] = False,
    write_fingerprint: Annotated[
        bool, typer.Option("--write-fingerprint", help="Write DIRECTORY's fingerprint first.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run and push code that is not this package's.")
    ] = False,
    per: Annotated[
        str, typer.Option("--per", help="What a row of a dataset of features is: slide or tile.")
    ] = "slide",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Download what was pushed, and compare it.")
    ] = True,
) -> None:
    """Check a model or dataset, say exactly what would go to the Hub, and with --push send it."""
    if sys.stderr.isatty():
        os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # an upload may take an hour
    from .hub_upload.hub import Target, check_login

    target = Target(repo_id, private=private, gated=gated, tag=tag, update=update)
    if push:
        check_login()
    from .commands.release import release as run

    raise typer.Exit(
        run(
            directory=directory,
            target=target,
            push_it=push,
            include=include or [],
            allowed=allow or [],
            trust_remote_code=trust_remote_code,
            with_training=with_training,
            fingerprint=write_fingerprint,
            per=per,
            verify=verify,
        )
    )
