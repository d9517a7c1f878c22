"""From a folder of slide features to bags that a head can learn from: found by name, labelled, checked, padded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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


def tiles_of(bag: SlideFeatures, region_tiles: int = 1) -> torch.Tensor:
    """The features float32 of what a head is to see of a slide.

    Args:
        region_tiles: tiles in a region for a head over regions, 1 for one over tiles.

    Returns (n, D), the tiles that could be read, or (n, region_tiles, D), the regions with such a tile, in which the others
    are NaN. Raises UserError when there is none, when a feature of a readable tile is not a finite number, or when the
    bag has no such regions.
    """
    valid = torch.from_numpy(np.array(bag.valid))
    features = torch.from_numpy(np.array(bag.features, np.float32))
    if not valid.any():
        raise UserError(f"{bag.slide} has no tile that could be read: leave it out")
    if not features[valid].isfinite().all():
        raise UserError(f"{bag.slide} has features that are not finite numbers: embed it again, in float32")
    if region_tiles == 1:
        return features[valid]
    if bag.region**2 != region_tiles:
        raise UserError(
            f"{bag.slide} has regions of {bag.region**2} tiles, and the head is for regions of {region_tiles}: "
            "embed it with --regions"
        )
    if len(bag) % region_tiles:
        raise UserError(f"{bag.slide} has {len(bag)} tiles, no whole regions of {region_tiles}: embed it again")
    regions = features.masked_fill(~valid.unsqueeze(1), float("nan")).unflatten(0, (-1, region_tiles))
    return regions[valid.unflatten(0, (-1, region_tiles)).any(dim=1)]


def draw_batch(bags: Sequence[torch.Tensor], most: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of what `tiles_of` makes: features (B, N, D) of tiles, and mask bool (B, N), True = real tile.

    Args:
        most: how many tiles, or regions, are drawn of each bag by torch's generator, without replacement; all in their
            order when None, or when a bag has no more.

    What is masked is 0.
    """
    drawn = [
        bag if most is None or len(bag) <= most else bag[torch.randperm(len(bag))[:most]] for bag in bags
    ]  # (n, D), or (n, T, D)
    features = pad_sequence(drawn, batch_first=True, padding_value=float("nan"))
    features = features.flatten(1, -2)  # (B, N, D)
    mask = ~features.isnan().all(dim=-1)
    return features.nan_to_num(0.0), mask
