"""The verbs that read slides, and those that make features of them."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import Cohort, DryRun, EncoderName, Licence, Limit, MinTissue, Out, Partial, SlideFolder, SlideMpp


def doctor(
    slides: Annotated[Path | None, typer.Argument(help="Folder of slides to look at.")] = None,
    encoder: Annotated[str | None, typer.Option("--encoder", help="Encoder to run one tile through.")] = None,
    slide_mpp: SlideMpp = None,
) -> None:
    """Check the set-up by running one tile through all of it."""
    from .commands.doctor import doctor as run

    raise typer.Exit(run(slides=slides, encoder=encoder, slide_mpp=slide_mpp))


def tile(
    slides: SlideFolder,
    out: Out,
    mpp: Annotated[float, typer.Option("--mpp", help="Microns per pixel of a tile.")],
    size: Annotated[int, typer.Option("--size", help="Edge of a tile in pixels.")],
    stride: Annotated[int | None, typer.Option("--stride", help="Pixels between tiles; default: no overlap.")] = None,
    min_tissue: MinTissue = 0.5,
    mpp_tolerance: Annotated[
        float, typer.Option("--mpp-tolerance", help="Share by which mpp may differ so that tiles fit the stored ones.")
    ] = 0.005,
    region: Annotated[int, typer.Option("--region", help="R: regions of R x R tiles, kept or dropped whole.")] = 1,
    partial: Partial = False,
    tissue: Annotated[
        str, typer.Option("--tissue", help="default, clam, clam-tcga, clam-biopsy ..., or a segmentation model.")
    ] = "default",
    masks: Annotated[
        Path | None, typer.Option("--masks", help="Folder of corrected outlines, SLIDE.geojson (QuPath).")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="Folder of annotations, SLIDE.geojson (QuPath).")
    ] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Only tiles of this annotated class; may be repeated.")
    ] = None,
    min_class: Annotated[float, typer.Option("--min-class", help="Share of a tile that the class must cover.")] = 0.5,
    icc: Annotated[bool, typer.Option("--icc", help="Convert to sRGB by the slide's colour profile.")] = False,
    half_scale: Annotated[
        bool, typer.Option("--half-scale", help="Decode JPEG at a fraction of its size: faster, not the same pixels.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Look at every stored tile for damage, now and whenever it is read.")
    ] = False,
    cohort: Cohort = None,
    slide_mpp: SlideMpp = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """Find the tissue of every slide and lay a grid of tiles over it."""
    from .commands.tile import tile as run
    from .slides.tiling import GridOptions

    options = GridOptions(
        mpp=mpp,
        tile_size=size,
        stride=stride,
        min_tissue=min_tissue,
        mpp_tolerance=mpp_tolerance,
        region=region,
        partial=partial,
        tissue=tissue,
        masks=masks and str(masks),
        annotations=annotations and str(annotations),
        classes=classes or None,
        min_class=min_class,
        icc=icc,
        half_scale=half_scale,
        verify=verify,
    )
    raise typer.Exit(
        run(
            slides=slides,
            out=out,
            options=options,
            cohort=cohort,
            slide_mpp=slide_mpp,
            limit=limit,
            dry_run=dry_run,
        )
    )


def shard(
    slides: SlideFolder,
    out: Out,
    mpp: Annotated[float, typer.Option("--mpp", help="Microns per pixel of a tile.")],
    size: Annotated[int, typer.Option("--size", help="Edge of a tile in pixels.")],
    tiles: Annotated[Path | None, typer.Option("--tiles", help="Tiling folder; default: OUT.tiles, made now.")] = None,
    format: Annotated[str, typer.Option("--format", help="parquet or webdataset.")] = "parquet",
    quality: Annotated[int, typer.Option("--quality", help="Of the JPEG of tiles that have to be encoded.")] = 90,
    shard_mb: Annotated[int, typer.Option("--shard-mb", help="Megabytes of a shard, about.")] = 500,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of the tiles.")] = 0,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Slide after slide instead of mixed.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Decode also the tiles that are passed on as they are stored.")
    ] = True,
    min_tissue: MinTissue = 0.5,
    licence: Licence = None,
    cohort: Cohort = None,
    slide_mpp: SlideMpp = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """Write the tiles of all slides as a dataset for the Hub: Parquet or WebDataset, with a card."""
    from .commands.shard import shard as run
    from .slides.tiling import GridOptions

    raise typer.Exit(
        run(
            slides=slides,
            out=out,
            options=GridOptions(mpp=mpp, tile_size=size, min_tissue=min_tissue),
            tiles=tiles,
            format=format,
            quality=quality,
            shard_mb=shard_mb,
            seed=seed,
            keep_order=keep_order,
            verify=verify,
            licence=licence,
            cohort=cohort,
            slide_mpp=slide_mpp,
            limit=limit,
            dry_run=dry_run,
        )
    )


def embed(
    slides: SlideFolder,
    encoder: EncoderName,
    out: Out,
    tiles: Annotated[Path | None, typer.Option("--tiles", help="Tiling folder; default: OUT/tiles, made now.")] = None,
    mpp: Annotated[float | None, typer.Option("--mpp", help="Microns per pixel; default: the encoder's.")] = None,
    size: Annotated[int | None, typer.Option("--size", help="Edge of a tile; default: the encoder's input.")] = None,
    regions: Annotated[
        int | None, typer.Option("--regions", help="Pixels of regions, kept or dropped whole; default: the encoder's.")
    ] = None,
    min_tissue: MinTissue = 0.5,
    partial: Partial = False,
    pooling: Annotated[str | None, typer.Option("--pooling", help="cls, mean, cls+mean or gap.")] = None,
    other_mpp: Annotated[
        bool, typer.Option("--other-mpp", help="Allow tiles that the encoder was not made for.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Tiles in a batch.")] = 64,
    threads: Annotated[
        int | None, typer.Option("--threads", help="That read; default: all cores beside a GPU, else 1.")
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="Of the encoder: float32, bfloat16 or float16.")
    ] = "float32",
    dtype: Annotated[str, typer.Option("--dtype", help="Of the features in files: float32 or float16.")] = "float32",
    max_invalid: Annotated[
        float, typer.Option("--max-invalid", help="Share of unreadable tiles over which a slide fails.")
    ] = 0.01,
    stage: Annotated[
        Path | None,
        typer.Option("--stage", help="Folder on a fast disk: slides are copied there before they are read."),
    ] = None,
    licence: Licence = None,
    cohort: Cohort = None,
    slide_mpp: SlideMpp = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """Turn the tiles of every slide into features, one file per slide."""
    from .commands.embed import embed as run

    raise typer.Exit(
        run(
            slides=slides,
            encoder=encoder,
            out=out,
            tiles=tiles,
            mpp=mpp,
            size=size,
            regions=regions,
            min_tissue=min_tissue,
            partial=partial,
            pooling=pooling,
            other_mpp=other_mpp,
            batch_size=batch_size,
            threads=threads,
            precision=precision,
            dtype=dtype,
            max_invalid=max_invalid,
            stage=stage,
            licence=licence,
            cohort=cohort,
            slide_mpp=slide_mpp,
            limit=limit,
            dry_run=dry_run,
        )
    )


def regions(
    features: Annotated[Path, typer.Argument(help="Folder that `embed --regions` wrote.")],
    encoder: Annotated[str, typer.Option("--encoder", help="Hierarchy whose first level made the features.")],
    out: Out,
    limit: Limit = None,
) -> None:
    """Turn features of tiles into those of regions and slides, by a hierarchy, without reading the slides again."""
    from .commands.regions import regions as run

    raise typer.Exit(run(features=features, encoder=encoder, out=out, limit=limit))
