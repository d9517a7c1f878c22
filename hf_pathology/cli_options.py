"""Options that several verbs of the command line share."""

from pathlib import Path
from typing import Annotated

import typer


SlideFolder = Annotated[
    Path, typer.Argument(help="Folder of slides, searched with all its sub-folders, or one slide.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Cohort = Annotated[
    Path | None,
    typer.Option("--cohort", help="CSV with columns slide and optionally case, label, split, mpp, weight."),
]
SlideMpp = Annotated[
    float | None, typer.Option("--slide-mpp", help="Microns per level-0 pixel of slides that do not say it rightly.")
]
Limit = Annotated[int | None, typer.Option("--limit", help="Only this many slides.")]
Licence = Annotated[
    str | None, typer.Option("--licence", help="Of what is written, for its card: apache-2.0, cc-by-nc-4.0 ...")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and how long it would take.")]
MinTissue = Annotated[float, typer.Option("--min-tissue", help="Share of a tile, or region, that must be tissue.")]
Partial = Annotated[
    bool, typer.Option("--partial", help="Also tiles, or regions, over the right and lower edge, white beyond it.")
]
EncoderName = Annotated[
    str, typer.Option("--encoder", help="Hub id or directory of any encoder that AutoModel loads.")
]
