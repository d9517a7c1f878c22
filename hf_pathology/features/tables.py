"""Bags as tables of other libraries: `datasets`, with a row for each slide or each tile, and AnnData for one slide."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from ..atomic import atomic_path
from ..errors import UserError
from .bags import feature_keys
from .store import SlideFeatures, features_path


if TYPE_CHECKING:
    from anndata import AnnData


Row = Literal["slide", "tile"]
PROVENANCE = {  # in every row, so that no way of saving or joining tables loses it
    "slide": Value("string"),
    "encoder": Value("string"),
    "revision": Value("string"),
    "pooling": Value("string"),
    "size": Value("int64"),
    "mpp": Value("float64"),
    "extent": List(Value("float64"), length=2),
    "slide_size": List(Value("int64"), length=2),
    "region": Value("int64"),
}


def to_dataset(bags: Iterable[SlideFeatures], per: Row = "slide", file: str | Path | None = None) -> Dataset:
    """The bags as a dataset; `from_dataset` gives them back bit for bit.

    A slide's row has the columns of `PROVENANCE`, features (N, D), xy (N, 2) and valid (N,); a tile's row the same
    provenance, feature (D,), x, y and valid.

    Args:
        bags: read one after the other, so that an iterator such as `saved_bags` may pass over more than memory holds.
        per: what a row is, "slide" or "tile".
        file: where to write the dataset as an Arrow file, from which it is then mapped; in memory when None.

    Raises UserError when there is no bag, or one has features of another length or dtype than the first.
    """
    if per not in get_args(Row):
        raise UserError(f"per is {per!r}: a row can be a slide or a tile")
    bags = iter(bags)
    first = next(bags, None)
    if first is None:
        raise UserError("there are no bags to make a dataset of")
    features = columns_of(first, per)
    # Not Dataset.from_generator: its cache goes by a hash of the arguments, and would miss that a folder has changed.
    tables = (table_of(bag, per, features) for bag in chain([first], bags))
    if file is None:
        return Dataset(pa.concat_tables(tables))
    with (
        atomic_path(file) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_stream(sink, features.arrow_schema) as writer,
    ):
        for table in tables:
            writer.write_table(table)
    return Dataset.from_file(str(file))


def saved_bags(folder: str | Path) -> Iterator[SlideFeatures]:
    """The bags of a feature folder, sorted by slide, one mapped at a time. Raises UserError when one is damaged."""
    return (SlideFeatures.load(features_path(folder, key)) for key in feature_keys(folder))


def columns_of(bag: SlideFeatures, per: Row) -> Features:
    """The declared columns of a dataset of bags like this one."""
    vector = List(Value(bag.features.dtype.name), length=bag.features.shape[1])
    if per == "tile":
        tile = {"x": Value("int64"), "y": Value("int64"), "valid": Value("bool"), "feature": vector}
        return Features({**PROVENANCE, **tile})
    corners = List(List(Value("int64"), length=2))
    return Features({**PROVENANCE, "xy": corners, "valid": List(Value("bool")), "features": List(vector)})


def table_of(bag: SlideFeatures, per: Row, features: Features) -> pa.Table:
    """The rows of one bag. Raises UserError when its features are not of the declared columns."""
    if columns_of(bag, per) != features:
        kind = f"{bag.features.shape[1]} numbers as {bag.features.dtype}"
        raise UserError(f"{bag.slide} has features of {kind}, unlike the slides before: make a dataset for each kind")
    vectors = pa.FixedSizeListArray.from_arrays(bag.features.reshape(-1), bag.features.shape[1])
    columns: dict[str, pa.Array | list]
    if per == "tile":
        rows = len(bag)
        columns = {"x": bag.xy[:, 0], "y": bag.xy[:, 1], "valid": bag.valid, "feature": vectors}
    else:
        rows, whole = 1, [0, len(bag)]
        corners = pa.FixedSizeListArray.from_arrays(bag.xy.reshape(-1), 2)
        columns = {
            "xy": pa.ListArray.from_arrays(whole, corners),
            "valid": pa.ListArray.from_arrays(whole, pa.array(bag.valid)),
            "features": pa.ListArray.from_arrays(whole, vectors),
        }
    provenance = {name: [getattr(bag, name)] * rows for name in PROVENANCE}
    return pa.table({**provenance, **columns}, schema=features.arrow_schema)


def from_dataset(dataset: Dataset) -> list[SlideFeatures]:
    """The bags of a dataset that `to_dataset` made, in the order in which their slides first appear.

    Tiles are put together by their slide, in the order of their rows, wherever these stand.
    Raises UserError for a dataset of other columns.
    """
    dataset = dataset.with_format("arrow")
    if {*PROVENANCE, "xy", "valid", "features"} <= set(dataset.column_names):
        return [bag_of_slide_row(dataset[row]) for row in range(len(dataset))]
    if {*PROVENANCE, "x", "y", "valid", "feature"} <= set(dataset.column_names):
        slides, first, slide_of = np.unique(
            dataset.select_columns("slide")[:]["slide"].to_numpy(), return_index=True, return_inverse=True
        )
        return [bag_of_tile_rows(dataset[np.flatnonzero(slide_of == slide)]) for slide in np.argsort(first)]
    raise UserError(f"a dataset with the columns {', '.join(dataset.column_names)} holds no slide features")


def bag_of_slide_row(table: pa.Table) -> SlideFeatures:
    """The bag in a table of one slide's row."""
    features, xy, valid = (table[name].combine_chunks().flatten() for name in ("features", "xy", "valid"))
    return SlideFeatures(
        **provenance_of(table),
        features=rows_of(features),
        xy=rows_of(xy),
        valid=valid.to_numpy(zero_copy_only=False),
    )


def bag_of_tile_rows(table: pa.Table) -> SlideFeatures:
    """The bag in a table of the tiles of one slide."""
    return SlideFeatures(
        **provenance_of(table),
        features=rows_of(table["feature"].combine_chunks()),
        xy=np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1),
        valid=table["valid"].to_numpy(),
    )


def rows_of(lists: pa.FixedSizeListArray) -> np.ndarray:
    """An array (N, D) of N lists of D numbers each, without a copy."""
    return lists.flatten().to_numpy().reshape(len(lists), lists.type.list_size)


def provenance_of(table: pa.Table) -> dict[str, object]:
    """The fields of a bag that are in every row, from the first one."""
    row = table.select(list(PROVENANCE)).slice(0, 1).to_pylist()[0]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def to_anndata(bag: SlideFeatures) -> "AnnData":
    """The bag as AnnData, for scanpy and squidpy: a tile is an observation, a number of its feature vector a variable.

    X: the features (N, D). obs: valid, x, y. obsm["spatial"]: centres of the tiles, float64 (N, 2), level-0 pixels.
    uns["hf_pathology"]: where the features come from. Raises UserError when anndata is not installed.
    """
    try:
        from anndata import AnnData
    except ImportError as error:
        raise UserError("AnnData needs a package of its own: pip install hf_pathology[anndata]") from error
    import pandas as pd

    names = [f"{bag.slide}:{x}:{y}" for x, y in bag.xy]
    obs = pd.DataFrame({"valid": bag.valid, "x": bag.xy[:, 0], "y": bag.xy[:, 1]}, index=names)
    provenance = {name: getattr(bag, name) for name in PROVENANCE}
    return AnnData(
        X=bag.features.copy(),
        obs=obs,
        obsm={"spatial": bag.xy + np.array(bag.extent) / 2},
        uns={"hf_pathology": {k: np.array(v) if isinstance(v, tuple) else v for k, v in provenance.items()}},
    )
