"""The verbs between published checkpoints, releases and the Hub."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import Out


def convert(
    format: Annotated[
        str,
        typer.Argument(help="dino, ibot, phikon, mae, mae-full, hipt, slpd, intelligens, simclr, moco, byol or vit."),
    ],
    files: Annotated[
        list[Path],
        typer.Argument(
            help="A checkpoint: file, folder or archive; of hipt and slpd also both levels, one after another."
        ),
    ],
    out: Out,
    student: Annotated[
        bool,
        typer.Option(
            "--student", help="Take the other network: the student, encoder_k of moco, the target network of byol."
        ),
    ] = False,
    num_heads: Annotated[int | None, typer.Option("--num-heads", help="Of the ViT; default: by its width.")] = None,
    region_heads: Annotated[
        int | None, typer.Option("--region-heads", help="Of the second level of hipt and slpd; default: 6.")
    ] = None,
    decoder_heads: Annotated[
        int | None, typer.Option("--decoder-heads", help="Of the decoder of mae-full; default: 16.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Edge of its tiles in pixels; default: the format's own.")
    ] = None,
    statistics: Annotated[
        str | None, typer.Option("--statistics", help="Of pixels: imagenet, half or none; default: the format's own.")
    ] = None,
    mpp: Annotated[
        float | None, typer.Option("--mpp", help="Microns per pixel of the tiles that it was trained on.")
    ] = None,
    max_gb: Annotated[float, typer.Option("--max-gb", help="Refuse checkpoints that hold more.")] = 16.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check everything, and write nothing.")] = False,
) -> None:
    """Turn a published checkpoint into a release that AutoModel loads. Nothing in its file is executed."""
    from .commands.convert import convert as run

    options = {
        "student": student,
        "num_heads": num_heads,
        "region_heads": region_heads,
        "decoder_heads": decoder_heads,
    }
    options |= {"image_size": image_size, "statistics": statistics, "mpp": mpp}
    raise typer.Exit(run(form=format, files=files, out=out, max_gb=max_gb, dry_run=dry_run, **options))


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
