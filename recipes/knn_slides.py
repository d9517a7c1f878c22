"""What slides' embeddings are worth without training anything: their nearest neighbours, as HIPT evaluates it.

    python recipes/knn_slides.py --features FEATURES/region_level --cohort cohort.csv --out knn

An embedding is the mean over a slide's regions, or tiles, whichever the folder holds. Writes `knn.json` and `knn.csv`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from hf_pathology.atomic import write_json
from hf_pathology.evaluation.slide_knn import SlideKnn, slide_knn
from hf_pathology.features.bags import LabelledBags, read_labelled_bags
from hf_pathology.recipes.predict_slides import write_table
from hf_pathology.training.config import parse_config
from hf_pathology.training.start import run_recipe


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    features: Path = field(metadata={"help": "folder of features of tiles, or of regions"})
    cohort: Path = field(metadata={"help": "CSV with the columns slide, label and optionally case"})
    out: Path = field(metadata={"help": "folder to write to"})
    folds: int = field(default=10, metadata={"help": "by case; 10 as published"})
    k: int = field(default=5, metadata={"help": "neighbours that vote; 5 as published"})
    seed: int = field(default=0, metadata={"help": "of the folds"})


def knn_slides(data: LabelledBags, *, folds: int = 10, k: int = 5, seed: int = 0) -> SlideKnn:
    """The neighbours' verdict over the mean features of the bags; see `slide_knn`."""
    embeddings = np.stack([bag.features[bag.valid].mean(axis=0, dtype=np.float64) for bag in data.bags])
    return slide_knn(embeddings, data.labels, data.cases, folds=folds, k=k, seed=seed)


def main(argv: Sequence[str] | None = None) -> None:
    (asked,) = parse_config(Arguments, argv=argv)
    data = read_labelled_bags(asked.features, asked.cohort)
    found = knn_slides(data, folds=asked.folds, k=asked.k, seed=asked.seed)
    table = pd.DataFrame({"slide": [bag.slide for bag in data.bags], "case": data.cases, "label": data.labels})
    table["fold"] = found.folds
    for number, name in enumerate(found.classes):
        table[f"votes_{name}"] = found.votes[:, number]
    write_table(table, asked.out / "knn.csv")
    numbers = {name: value for name, value in asdict(asked).items() if name in ("folds", "k", "seed")}
    facts = {name: getattr(data.bags[0], name) for name in ("encoder", "revision", "pooling", "size", "mpp")}
    auc = {"mean": float(np.mean(found.aucs)), "std": float(np.std(found.aucs)), "folds": found.aucs}
    write_json(asked.out / "knn.json", {"auc": auc, **numbers, "features": facts, "missing": data.missing})
    for problem in data.missing:
        print(problem)
    print(f"ROC-AUC of the nearest neighbours {found}: {asked.out}")


if __name__ == "__main__":
    run_recipe(main)
