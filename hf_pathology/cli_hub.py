"""The verbs between published checkpoints, releases and the Hub."""

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
