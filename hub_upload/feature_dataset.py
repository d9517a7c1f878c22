"""A folder of slide features as a folder that the Hub takes for a dataset: Parquet files and a card."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, disable_progress_bars
from huggingface_hub import DatasetCardData

from hf_pathology.features.bags import feature_keys
from hf_pathology.features.store import SlideFeatures, features_path
from hf_pathology.features.tables import Row, saved_bags, to_dataset
from hf_pathology.hub_upload.cards import filled
from hf_pathology.version import __version__


FILE_BYTES = 500_000_000  # of a Parquet file, about


@contextmanager
def feature_dataset(folder: Path, per: Row) -> Iterator[Path]:
    """A temporary folder with the features of `folder` as `data/*.parquet` and a card; it takes as much room again, twice.

    A README.md in the folder of features is taken as the card. Raises UserError when features of several kinds lie together.
    """
    disable_progress_bars()
    with TemporaryDirectory() as temporary:
        made = Path(temporary) / "dataset"
        (made / "data").mkdir(parents=True)
        dataset = to_dataset(saved_bags(folder), per, Path(temporary) / "features.arrow")
        count = max(1, min(len(dataset), round(dataset.data.nbytes / FILE_BYTES)))
        for index in range(count):
            part = dataset.shard(count, index, contiguous=True)
            part.to_parquet(made / "data" / f"train-{index:05d}-of-{count:05d}.parquet")
        own = folder / "README.md"
        card = own.read_text(encoding="utf-8") if own.is_file() else features_card(folder, dataset, per)
        (made / "README.md").write_text(card, encoding="utf-8")
        yield made


def features_card(folder: Path, dataset: Dataset, per: Row) -> str:
    """The card of a dataset of features, Markdown with the metadata by which `datasets` loads it."""
    keys = feature_keys(folder)
    bag = SlideFeatures.load(features_path(folder, keys[0]))
    files = {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    data = DatasetCardData(
        pretty_name="Features of whole-slide images",
        tags=["pathology", "whole-slide-image", "features"],
        task_categories=["image-feature-extraction"],
        configs=[files],
    )
    rows = dataset.select_columns("valid")["valid"]
    return filled(
        "feature_dataset.md.j2",
        metadata=data.to_yaml(),
        tiles=len(dataset) if per == "tile" else sum(len(row) for row in rows),
        slides=len(keys),
        width=bag.features.shape[1],
        dtype=bag.features.dtype.name,
        per=per,
        version=__version__,
        **{name: getattr(bag, name) for name in ("encoder", "revision", "pooling", "size", "mpp")},
    )
