"""From a folder of slide features to bags that a head can learn from: found by name, labelled, checked, padded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import UserError
from ..slides.cohort import read_table, slide_names
from .store import SUFFIX, SlideFeatures, load_cohort_features


@dataclass(frozen=True)
class LabelledBags:
    """Bags with what is known of their slides: lists of the same length, and what had to be left out.

    Attributes:
        bags: the features of each slide.
        labels: the class name of each.
        cases: the patient of each.
        missing: one message for each slide that the table labels but that cannot be used.
    """

    bags: list[SlideFeatures]
    labels: list[str]
    cases: list[str]
    missing: list[str]


def read_labelled_bags(features_dir: str | Path, cohort: str | Path) -> LabelledBags:
    """The bags of the slides to which the CSV `cohort` gives a label; rows without one are passed over.

    The table has the columns slide, label, and optionally case (the slide's key where it is empty). It names a slide as
    `read_cohort` allows: by its key, or by its name with or without suffix where that is unique.

    Raises UserError for a table that names a slide twice, or labels none that has features.
    """
    rows = read_table(cohort, required=("slide", "label"))
    rows = rows[rows["label"] != ""].to_dict("records")
    key_of = slide_names(feature_keys(features_dir))
    row_of = {key_of.get(row["slide"], row["slide"]): row for row in rows}
    if len(row_of) < len(rows):
        raise UserError(f"{cohort} has {len(rows)} labels for {len(row_of)} slides: keep one row for each slide")
    bags, missing = load_bags(features_dir, row_of)
    if not bags:
        raise UserError(f"{cohort} labels no slide that has features in {features_dir}")
    return LabelledBags(
        bags=bags,
        labels=[row_of[bag.slide]["label"] for bag in bags],
        cases=[row_of[bag.slide].get("case") or bag.slide for bag in bags],
        missing=missing,
    )


def load_bags(features_dir: str | Path, slides: Iterable[str]) -> tuple[list[SlideFeatures], list[str]]:
    """The bags of the slides with these keys, and one message for each that has no features or no readable tile."""
    bags, missing = load_cohort_features(features_dir, slides)
    missing += [
        f"{bag.slide} has no tile that could be read: look at the slide" for bag in bags if not bag.valid.any()
    ]
    return [bag for bag in bags if bag.valid.any()], missing


def feature_keys(features_dir: str | Path) -> list[str]:
    """The keys of the slides that have features in the folder, sorted. Raises UserError when there is none."""
    files = Path(features_dir).rglob(f"*{SUFFIX}")
    keys = sorted(file.relative_to(features_dir).as_posix().removesuffix(SUFFIX) for file in files)
    if not keys:
        raise UserError(f"{features_dir} holds no features: make them with `hf-pathology embed`")
    return keys


def tiles_of(bag: SlideFeatures) -> torch.Tensor:
    """The features float32 (n, D) of the tiles that could be read.

    Raises UserError when there is none, or when a feature is not a finite number.
    """
    tiles = torch.from_numpy(bag.features[bag.valid]).float()
    if len(tiles) == 0:
        raise UserError(f"{bag.slide} has no tile that could be read: leave it out")
    if not tiles.isfinite().all():
        raise UserError(f"{bag.slide} has features that are not finite numbers: embed it again, in float32")
    return tiles


def draw_batch(bags: Sequence[torch.Tensor], max_tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to `max_tiles` tiles of each bag (n, D), padded: features (B, N, D) and mask bool (B, N), True = real tile.

    The tiles are drawn without replacement by torch's generator; the padding is 0.
    """
    drawn = [tiles if len(tiles) <= max_tiles else tiles[torch.randperm(len(tiles))[:max_tiles]] for tiles in bags]
    lengths = torch.tensor([len(tiles) for tiles in drawn])
    features = pad_sequence(drawn, batch_first=True)
    return features, torch.arange(features.shape[1]) < lengths.unsqueeze(1)
