"""The verbs that make slide classifiers of features, and use them."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import Licence, Limit, Out, SlideFolder, SlideMpp


def train_mil(
    features: Annotated[Path, typer.Option("--features", help="Folder that `embed` wrote.")],
    cohort: Annotated[Path, typer.Option("--cohort", help="CSV with columns slide, label and optionally case.")],
    out: Out,
    folds: Annotated[int, typer.Option("--folds", help="Of the cross-validation by case.")] = 5,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the bags.")] = 40,
    seed: Annotated[int, typer.Option("--seed", help="Of folds, weights and draws.")] = 0,
    head: Annotated[
        str,
        typer.Option(
            "--head", help="abmil, dsmil, deep_attn_misl, deep_graph_conv; over regions: hipt, hipt_attention."
        ),
    ] = "abmil",
    region_encoder: Annotated[
        str | None, typer.Option("--region-encoder", help="Hierarchy with whose second level hipt starts.")
    ] = None,
    freeze_regions: Annotated[bool, typer.Option("--freeze-regions", help="Leave that level as it is.")] = False,
    licence: Licence = None,
) -> None:
    """Cross-validate a slide classifier (multiple-instance learning) on features, and train the final one."""
    from .commands.mil import train_mil as run

    raise typer.Exit(
        run(
            features=features,
            cohort=cohort,
            out=out,
            folds=folds,
            epochs=epochs,
            seed=seed,
            head=head,
            region_encoder=region_encoder,
            freeze_regions=freeze_regions,
            licence=licence,
        )
    )


def predict(
    head: Annotated[Path, typer.Option("--head", help="Folder of a head that `train-mil` wrote.")],
    features: Annotated[Path, typer.Option("--features", help="Folder that `embed` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="CSV to write.")],
) -> None:
    """Classify slides by their features."""
    from .commands.mil import predict as run

    raise typer.Exit(run(head=head, features=features, out=out))


def heatmap(
    slides: SlideFolder,
    out: Out,
    head: Annotated[Path | None, typer.Option("--head", help="Folder of a head that `train-mil` wrote.")] = None,
    features: Annotated[Path | None, typer.Option("--features", help="Folder that `embed` wrote.")] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Instead of a head: a hierarchy, whose own attention is painted.")
    ] = None,
    tiles: Annotated[Path | None, typer.Option("--tiles", help="Tiling folder; default: OUT/tiles, made now.")] = None,
    region_head: Annotated[
        int | None, typer.Option("--region-head", help="Of the hierarchy's second level; default: the mean of all.")
    ] = None,
    tile_head: Annotated[
        int | None, typer.Option("--tile-head", help="Of its first level; default: the mean of all.")
    ] = None,
    pixel: Annotated[int, typer.Option("--pixel", help="Pixels of the slide that are one of its maps.")] = 16,
    slide_mpp: SlideMpp = None,
    limit: Limit = None,
) -> None:
    """Paint over slides where a slide classifier looks, or where a hierarchy does."""
    from .commands.heatmap import heatmap as run

    drawing = {"tiles": tiles, "region_head": region_head, "tile_head": tile_head, "pixel": pixel}
    raise typer.Exit(
        run(
            slides=slides,
            head=head,
            features=features,
            encoder=encoder,
            out=out,
            slide_mpp=slide_mpp,
            limit=limit,
            **drawing,
        )
    )
