"""Applies a trained head to the features of slides.

    accelerate launch recipes/predict_slides.py --head DIR --features DIR --out predictions.csv
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from transformers import AutoModel, HfArgumentParser, PreTrainedModel

import hf_pathology  # noqa: F401 - makes AutoModel know the heads
from hf_pathology.atomic import atomic_path
from hf_pathology.errors import UserError
from hf_pathology.features.store import SUFFIX, SlideFeatures, load_cohort_features


def predict(head_dir: str | Path, features_dir: str | Path, slides: Iterable[str]) -> tuple[pd.DataFrame, list[str]]:
    """One row per slide (slide, predicted, prob_<class> ...), and one message for each slide that could not be classified.

    Raises UserError when the features are not of the kind that the head was trained on.
    """
    head = load_head(head_dir).to(Accelerator().device)
    bags, missing = load_bags(features_dir, slides)
    for bag in bags:
        check_kind(head, bag)
    return to_table(head, bags), missing


def load_head(folder: str | Path) -> PreTrainedModel:
    """The head saved in `folder`, in evaluation mode. Raises UserError when there is none, or it lacks weights."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds no head: make one with `hf-pathology train-mil`")
    head, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    if loading["missing_keys"]:
        raise UserError(f"{folder} lacks the weights {', '.join(sorted(loading['missing_keys']))}: train the head again")
    return head.eval()


def load_bags(folder: str | Path, slides: Iterable[str]) -> tuple[list[SlideFeatures], list[str]]:
    """The bags of the slides with these keys, and one message for each that has no features or no readable tile."""
    bags, missing = load_cohort_features(folder, slides)
    missing += [f"{bag.slide} has no tile that could be read: look at the slide" for bag in bags if not bag.valid.any()]
    return [bag for bag in bags if bag.valid.any()], missing


def check_kind(head: PreTrainedModel, bag: SlideFeatures) -> None:
    """Raises UserError when `bag` is not of the kind that `head` was trained on, as far as its configuration says.

    An encoder is known by its revision, which is that of its weights, so it may have moved to another folder; by its
    name when the head records no revision.
    """
    config = head.config
    pairs = {
        "pooling": (config.pooling, bag.pooling),
        "mpp": (config.mpp, bag.mpp),
        "tile size": (config.tile_size, bag.size),
        "feature length": (config.input_dim, bag.features.shape[1]),
    }
    if config.encoder_revision:
        names = f"{config.encoder} ({config.encoder_revision})", f"{bag.encoder} ({bag.revision})"
        pairs = {"encoder": names if config.encoder_revision != bag.revision else (None, None), **pairs}
    else:
        pairs = {"encoder": (config.encoder, bag.encoder), **pairs}
    for what, (trained, given) in pairs.items():
        if trained is not None and trained != given:
            raise UserError(
                f"the head was trained on {what} {trained}, but the features of {bag.slide} have {what} {given}: "
                "embed the slides as the head's were, or train a head on these features"
            )


def class_probabilities(head: PreTrainedModel, bags: Sequence[SlideFeatures]) -> np.ndarray:
    """The probabilities float64 (n, C) that `head` gives to its classes for each bag; rows sum to 1."""
    with torch.inference_mode():
        logits = [head(tiles_of(bag).unsqueeze(0).to(head.device)).logits.squeeze(0) for bag in bags]
    return torch.stack(logits).double().softmax(dim=-1).cpu().numpy()


def tiles_of(bag: SlideFeatures) -> torch.Tensor:
    """The features float32 (n, D) of the tiles that could be read.

    Raises UserError when there is none, or a feature is not a finite number.
    """
    tiles = torch.from_numpy(bag.features[bag.valid])
    if len(tiles) == 0:
        raise UserError(f"{bag.slide} has no tile that could be read: leave it out")
    if not tiles.isfinite().all():
        raise UserError(f"{bag.slide} has features that are not finite numbers: embed it again, in float32")
    return tiles


def to_table(head: PreTrainedModel, bags: Sequence[SlideFeatures]) -> pd.DataFrame:
    """One row per bag: slide, predicted class, and the probability of each class."""
    classes = [head.config.id2label[index] for index in range(head.config.num_labels)]
    columns = ["slide", "predicted", *(f"prob_{name}" for name in classes)]
    if not bags:
        return pd.DataFrame(columns=columns)
    probabilities = class_probabilities(head, bags)
    predicted = [classes[index] for index in probabilities.argmax(axis=1)]
    return pd.DataFrame(zip([bag.slide for bag in bags], predicted, *probabilities.T), columns=columns)


def feature_keys(folder: str | Path) -> list[str]:
    """The keys of the slides that have features in `folder`, sorted. Raises UserError when there is none."""
    keys = sorted(path.relative_to(folder).as_posix().removesuffix(SUFFIX) for path in Path(folder).rglob(f"*{SUFFIX}"))
    if not keys:
        raise UserError(f"{folder} holds no features: make them with `hf-pathology embed`")
    return keys


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Writes `table` as CSV, whole or not at all."""
    with atomic_path(path) as partial:
        table.to_csv(partial, index=False)


@dataclass(frozen=True)
class Arguments:
    """What is asked for on the command line: the folders of the head and of the features, and the CSV to write."""

    head: Path
    features: Path
    out: Path


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    table, missing = predict(arguments.head, arguments.features, feature_keys(arguments.features))
    write_table(table, arguments.out)
    print(f"{len(table)} slides classified: {arguments.out}")
    if missing:
        sys.exit("\n".join(missing))


if __name__ == "__main__":
    main()
