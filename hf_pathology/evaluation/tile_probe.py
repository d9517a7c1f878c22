"""What an encoder in training knows of labelled tiles: nearest neighbours every n steps, logistic regression at the end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .intervals import accuracy_interval
from .knn import weighted_knn


STRENGTHS = tuple(10.0**power for power in range(-5, 4))  # scikit-learn's C, among which cross-validation chooses

FeaturesOf = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class TileItems(Protocol):
    """Labelled tiles as items {"tiles": uint8 (h, w, 3), "labels": int}; `TileDataset` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...


class TileJudge:
    """Judges an encoder by the neighbours of tiles it was not shown: `judge(encoder)`, as often as wanted.

    Args:
        known: labelled tiles, among which neighbours are looked for.
        asked: labelled tiles, of other groups, whose classes are asked for.
        features_of: features (B, D) of an encoder and its input (B, 3, size, size).
        groups: the group of each asked tile, what is not independent; with it, `judge` says how sure it is.
        size: edge of that input in pixels. Tiles are resized when the judge is made, as an encoder's release does it.
        mean, std: of the channels, for pixels between 0 and 1.
        k, temperature: see `weighted_knn`.
        batch_size: tiles that are encoded at once.
        dtype: of the forward pass; other than float32 by autocast.
    """

    def __init__(
        self,
        known: TileItems,
        asked: TileItems,
        features_of: FeaturesOf,
        *,
        groups: Sequence[str] | None = None,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        k: int = 20,
        temperature: float = 0.07,
        batch_size: int = 64,
        dtype: torch.dtype = torch.float32,
    ):
        self.known, self.known_labels = resized_tiles(known, size)
        self.asked, self.asked_labels = resized_tiles(asked, size)
        self.features_of, self.k, self.temperature = features_of, k, temperature
        self.groups = groups
        self.embedding = {"mean": mean, "std": std, "batch_size": batch_size, "dtype": dtype}

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """`knn_accuracy` and `knn_balanced_accuracy`, between 0 and 1. Nothing of the encoder is changed, nor drawn at random.

        With groups also `knn_accuracy_low` and `_high`, the 95 % interval when whole groups are resampled (none for less than
        two groups), and how many `knn_tiles` and `knn_groups` were asked.
        """
        predicted = self.predict(encoder)
        correct = predicted == self.asked_labels
        found = {
            "knn_accuracy": float(np.mean(correct)),
            "knn_balanced_accuracy": float(balanced_accuracy_score(self.asked_labels, predicted)),
        }
        if self.groups is None:
            return found
        groups = len(set(self.groups))
        if groups > 1:
            interval = accuracy_interval(self.groups, correct, seed=0)
            found |= {"knn_accuracy_low": interval.low, "knn_accuracy_high": interval.high}
        return {**found, "knn_tiles": len(correct), "knn_groups": groups}

    def predict(self, encoder: nn.Module) -> np.ndarray:
        """The classes (M,) that the neighbours of the asked tiles vote for."""
        known, asked = self.features(encoder)
        votes = weighted_knn(known, self.known_labels, asked, k=self.k, temperature=self.temperature)
        return votes.argmax(dim=1).numpy()

    def features(self, encoder: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """The features of the known tiles (N, D) and of the asked ones (M, D)."""
        known, asked = (
            embed_tiles(encoder, tiles, self.features_of, **self.embedding) for tiles in (self.known, self.asked)
        )
        return known, asked


def resized_tiles(items: TileItems, size: int) -> tuple[torch.Tensor, np.ndarray]:
    """All tiles, uint8 (N, 3, size, size), resized as `Encoder` does it, and their labels, int64 (N,)."""
    tiles, labels = torch.empty(len(items), 3, size, size, dtype=torch.uint8), np.empty(len(items), np.int64)
    for i in range(len(items)):
        item = items[i]
        tile, labels[i] = torch.from_numpy(item["tiles"]).permute(2, 0, 1), item["labels"]
        if tile.shape[1:] != (size, size):
            tile = F.resize(tile, [size, size], InterpolationMode.BICUBIC, antialias=True)
        tiles[i] = tile
    return tiles, labels


@torch.no_grad()
def embed_tiles(
    encoder: nn.Module,
    tiles: torch.Tensor,
    features_of: FeaturesOf,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Features (N, D), float32 on the CPU, of uint8 `tiles` (N, 3, h, w); arguments are those of `TileJudge`."""
    device = next(encoder.parameters()).device
    # Weights that autocast keeps from here would have no gradient in a training step around it: none is kept.
    precision = torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    with evaluating(encoder), precision:
        features = []
        for part in tiles.split(batch_size):
            pixels = F.normalize(part.to(device).float() / 255, list(mean), list(std))
            features.append(features_of(encoder, pixels).float().cpu())
    return torch.cat(features)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts all modules into eval mode within the block, and each back into its own mode after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def logistic_predictions(
    train: np.ndarray,
    train_labels: np.ndarray,
    train_groups: np.ndarray,
    test: np.ndarray,
    *,
    folds: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """The classes (M,) of the features `test` (M, D) by logistic regression on the standardised `train` (N, D).

    How strongly weights are held small is chosen among STRENGTHS by the accuracy in cross-validation on the training
    side, in which no group of `train_groups` (N,) is on both sides.
    """
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000)),
        {"logisticregression__C": STRENGTHS},
        cv=StratifiedGroupKFold(folds, shuffle=True, random_state=seed),
    )
    return search.fit(train, train_labels, groups=train_groups).predict(test)
