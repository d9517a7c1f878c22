"""A folder of slide features as a dataset on the Hub, with its card."""

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from hf_pathology.features.tables import Row, saved_bags, to_dataset
from hf_pathology.hub_upload.cards.dataset_cards import features_card


def push_features(
    folder: str | Path, repo_id: str, per: Row = "slide", *, private: bool | None = None, licence: str | None = None
) -> CommitInfo:
    """Uploads the bags of a feature folder to the Hub as the dataset `repo_id`, and returns the commit of the rows.

    The table is made in the temporary folder of the system, which has to hold as much as the features take.
    `from_dataset(load_dataset(repo_id, split="train"))` gives the bags back. The card goes first: `datasets` then adds the
    columns to its metadata.

    Args:
        per: what a row is, "slide" or "tile".
        private: whether nobody else may see it; by default as the account has it.
        licence: the Hub's identifier, for the card.
    """
    card = features_card(folder, per, licence=licence).replace("PATH_OR_ID", repo_id)
    api = HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        dataset = to_dataset(saved_bags(folder), per, Path(temporary) / "features.arrow")
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_file(
            path_or_fileobj=card.encode(),
            path_in_repo="README.md",
            repo_id=repo_id,
            repo_type="dataset",
            commit_message="The card",
        )
        return dataset.push_to_hub(repo_id, private=private)
