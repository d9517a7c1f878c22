"""How good are the heads over tiles on bags that others have used too?

    python benchmarks/mil_heads.py BAGS [--repeats 5] [--datasets musk1 elephant]

BAGS holds `mil_musk1.npz` and `mil_elephant.npz`: x (instances, D), offsets (bags + 1), y (bags,) and folds bool (repeats, 10, bags),
True where a bag is for training. Each head is trained as `train-mil` trains it, with one setting for all; nothing is chosen on
the fold that is tested. Says accuracy, as the literature does, and the area under the ROC curve, in per cent: mean and standard deviation over
the repeats.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.metrics import accuracy_score, roc_auc_score

from hf_pathology.features.store import SlideFeatures
from hf_pathology.recipes.predict_slides import class_probabilities
from hf_pathology.recipes.slide_heads import OVER_TILES, HeadOptions
from hf_pathology.recipes.train_mil import HeadTraining, train_head


TRAINING = HeadTraining(epochs=40, learning_rate=5e-4, weight_decay=1e-3, batch_size=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bags", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--datasets", nargs="+", default=["musk1", "elephant"])
    arguments = parser.parse_args()
    print("| bags | head | accuracy | AUC |\n|---|---|---|---|")
    for name in arguments.datasets:
        data = np.load(arguments.bags / f"mil_{name}.npz")
        bags, labels = read_bags(data)
        for head in OVER_TILES:
            scores = [scored(head, bags, labels, folds) for folds in data["folds"][: arguments.repeats]]
            mean, deviation = 100 * np.mean(scores, axis=0), 100 * np.std(scores, axis=0)
            cells = [f"{value:.1f} ± {spread:.1f}" for value, spread in zip(mean, deviation)]
            print(f"| {name} | {head} | {' | '.join(cells)} |", flush=True)


def read_bags(data: np.lib.npyio.NpzFile) -> tuple[list[SlideFeatures], list[str]]:
    """The bags as if they were slides, and their labels."""
    parts = np.split(data["x"].astype(np.float32), data["offsets"][1:-1])
    return [as_slide(str(number), part) for number, part in enumerate(parts)], [str(label) for label in data["y"]]


def as_slide(name: str, features: np.ndarray) -> SlideFeatures:
    """Instances have no places: they lie side by side."""
    xy = np.stack([np.arange(len(features)), np.zeros(len(features))], axis=1).astype(np.int64)
    return SlideFeatures(
        slide=name,
        encoder="given",
        revision="given",
        pooling="given",
        size=1,
        mpp=None,
        extent=(1.0, 1.0),
        slide_size=(len(features), 1),
        features=features,
        xy=xy,
        valid=np.ones(len(features), bool),
    )


def scored(head: str, bags: list[SlideFeatures], labels: list[str], folds: np.ndarray) -> tuple[float, float]:
    """Accuracy and area under the curve of one repeat, each over the bags of all folds together."""
    truth = np.array(labels)
    positive = np.zeros(len(bags))
    for fold in folds:
        train, test = np.flatnonzero(fold), np.flatnonzero(~fold)
        model = train_head(
            [bags[i] for i in train], [labels[i] for i in train], training=TRAINING, options=HeadOptions(head)
        )
        positive[test] = class_probabilities(model, [bags[i] for i in test])[:, 1]
    expected = (truth == np.unique(truth)[1]).astype(int)
    return accuracy_score(expected, positive > 0.5), roc_auc_score(expected, positive)


if __name__ == "__main__":
    main()
