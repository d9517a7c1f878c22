"""A folder of slide features as a folder that the Hub takes for a dataset: Parquet files and a card."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import disable_progress_bars
from huggingface_hub import DatasetCard

from hf_pathology.features.tables import Row, saved_bags, to_dataset
from hf_pathology.hub_upload.cards.dataset_cards import features_card


FILE_BYTES = 500_000_000  # of a Parquet file, about


@contextmanager
def feature_dataset(folder: Path, per: Row) -> Iterator[Path]:
    """A temporary folder with the features of `folder` as `data/*.parquet` and a card; it takes as much room again, twice.

    Raises UserError when features of several kinds lie together.
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
        (made / "README.md").write_text(dataset_card(folder, per), encoding="utf-8")
        yield made


def dataset_card(folder: Path, per: Row) -> str:
    """The card of the rows; one that somebody has written or changed in the folder of the features stays as it is."""
    file = folder / "README.md"
    if not file.is_file():
        return features_card(folder, per)
    own = file.read_text(encoding="utf-8")
    licence = DatasetCard(own).data.to_dict().get("license")
    return features_card(folder, per, licence=licence) if own == features_card(folder, licence=licence) else own
