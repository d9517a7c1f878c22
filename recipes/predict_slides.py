"""Applies a trained head to the features of slides.

accelerate launch recipes/predict_slides.py --head DIR --features DIR --out predictions.csv
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from transformers import AutoModel, PreTrainedModel

from hf_pathology.atomic import atomic_path
from hf_pathology.errors import UserError
from hf_pathology.evaluation.cross_validation import probability_columns
from hf_pathology.features.bags import draw_batch, feature_keys, load_bags, tiles_of
from hf_pathology.features.store import SlideFeatures
from hf_pathology.hub_upload.cards.names import public_name
from hf_pathology.modeling.modeling_slide_head import SlideOutput
from hf_pathology.training.config import parse_config
from hf_pathology.training.start import run_recipe


def predict(head_dir: str | Path, features_dir: str | Path, slides: Iterable[str]) -> tuple[pd.DataFrame, list[str]]:
    """One row per slide (slide, predicted, prob_<class> ...), and a message for each slide that could not be classified.

    Raises UserError when there is no head, or the features are not of the kind that it was trained on.
    """
    head = load_head(head_dir).to(Accelerator().device)
    bags, missing = load_bags(features_dir, slides)
    for bag in bags:
        check_kind(head, bag)
    return prediction_table(head, bags), missing


def load_head(folder: str | Path) -> PreTrainedModel:
    """The head saved in `folder`, in evaluation mode. Raises UserError when there is none, or when it lacks weights."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds no head: make one with `hf-pathology train-mil`")
    head, loading = AutoModel.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)
    if loading["missing_keys"]:
        raise UserError(
            f"{folder} lacks the weights {', '.join(sorted(loading['missing_keys']))}: train the head again"
        )
    return head.eval()


def check_kind(head: PreTrainedModel, bag: SlideFeatures) -> None:
    """Raises UserError when `bag` is not of the kind that `head` was trained on, as far as its configuration says.

    Encoders are the same when their revisions are, which stand for the weights: a folder may have moved. Where the head
    has no revision, the encoder's name counts.
    """
    config = head.config
    named = config.encoder and public_name(config.encoder)
    same_weights = config.encoder_revision and config.encoder_revision == bag.revision
    pairs = {
        "encoder": (named, named if same_weights else public_name(bag.encoder)),
        "encoder revision": (config.encoder_revision or None, bag.revision),
        "pooling": (config.pooling, bag.pooling),
        "mpp": (config.mpp, bag.mpp),
        "tile size": (config.tile_size, bag.size),
        "feature length": (config.input_dim, bag.features.shape[1]),
    }
    for what, (trained, given) in pairs.items():
        if trained is not None and trained != given:
            raise UserError(
                f"the head was trained on {what} {trained}, but the features of {bag.slide} have {what} {given}: "
                "embed the slides as those of the head were, or train a head on these features"
            )


@torch.inference_mode()
def whole_slide(head: PreTrainedModel, bag: SlideFeatures) -> SlideOutput:
    """What `head` says of all tiles of a slide, or of all its regions. `tile_scores` are those of the readable tiles."""
    features, mask = draw_batch([tiles_of(bag, getattr(head.config, "region_tiles", 1))])
    output = head(features.to(head.device), mask.to(head.device))
    output.tile_scores = output.tile_scores[:, mask[0].to(head.device)]
    return output


def class_probabilities(head: PreTrainedModel, bags: Sequence[SlideFeatures]) -> np.ndarray:
    """The probabilities float64 (n, C) that `head` gives to its classes for each bag; rows sum to 1."""
    logits = [whole_slide(head, bag).logits.squeeze(0) for bag in bags]
    return torch.stack(logits).double().softmax(dim=-1).cpu().numpy()


def prediction_table(head: PreTrainedModel, bags: Sequence[SlideFeatures]) -> pd.DataFrame:
    """One row per bag: slide, predicted class, and the probability of each class."""
    classes = [head.config.id2label[index] for index in range(head.config.num_labels)]
    probabilities = class_probabilities(head, bags) if bags else np.zeros((0, len(classes)))
    columns = {"slide": [bag.slide for bag in bags], "predicted": [classes[i] for i in probabilities.argmax(axis=1)]}
    return pd.DataFrame(columns | probability_columns(classes, probabilities))


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Writes `table` as CSV, whole or not at all."""
    with atomic_path(path) as partial:
        table.to_csv(partial, index=False)


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    head: Path = field(metadata={"help": "folder of the head that train_mil.py wrote"})
    features: Path = field(metadata={"help": "folder of slide features; all of its slides are classified"})
    out: Path = field(metadata={"help": "CSV to write"})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_config(Arguments, argv=argv)
    table, missing = predict(arguments.head, arguments.features, feature_keys(arguments.features))
    write_table(table, arguments.out)
    print(f"{len(table)} slides classified: {arguments.out}")
    if missing:
        raise UserError("\n".join(missing))


if __name__ == "__main__":
    run_recipe(main)
