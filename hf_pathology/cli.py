"""The command line: its verbs, and what becomes of a mistake. What a verb does lies in `commands/`, imported when it is called."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_heads import heatmap, predict, train_mil
from .cli_hub import convert, release
from .cli_options import Cohort, Out
from .cli_slides import doctor, embed, regions, shard, tile
from .errors import UserError
from .version import __version__


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Hugging Face-ecosystem encoders for whole-slide images: pretrain, release, embed, classify.",
)

INTERRUPTED = 130  # the exit code that typer gives to Ctrl-C


def demo(
    out: Out = Path("demo"),
    slides: Annotated[Path | None, typer.Option("--slides", help="Your own slides instead of drawn ones.")] = None,
    cohort: Cohort = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Few small slides and steps: under a minute.")] = False,
) -> None:
    """The whole story: slides, tiles, iBOT pretraining, encoder, features, slide classifier, report."""
    from .commands.demo import demo as run

    raise typer.Exit(run(out=out, slides=slides, cohort=cohort, tiny=tiny))


for _name, _verb in {
    "demo": demo,
    "doctor": doctor,
    "tile": tile,
    "shard": shard,
    "embed": embed,
    "regions": regions,
    "train-mil": train_mil,
    "predict": predict,
    "heatmap": heatmap,
    "convert": convert,
    "release": release,
}.items():
    app.command(_name)(_verb)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Hugging Face-ecosystem encoders for whole-slide images: pretrain, release, embed, classify."""


def main() -> None:
    """Runs the command line; a user's mistake ends in one line, never in a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours say more than the libraries' bars of each file
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads spin otherwise, ruinous on a busy machine
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.strerror is None:
            raise
        print(f"error: {error.strerror}: {error.filename or 'no file named'}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("stopped; what is finished stays, and the same command goes on from there", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
