"""Classes of tiles by those of their nearest neighbours: the judge of features that has nothing to be fitted."""

import numpy as np
import torch
from torch.nn.functional import normalize, one_hot

from ..errors import UserError


CHUNK = 1024  # tiles whose similarities to all training tiles are held at once


@torch.no_grad()
def weighted_knn(
    train: torch.Tensor | np.ndarray,
    train_labels: torch.Tensor | np.ndarray,
    test: torch.Tensor | np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
) -> torch.Tensor:
    """The votes of the `k` nearest training tiles for each class, (M, C), float32 with a sum of 1; argmax is the prediction.

    A neighbour votes with exp(cosine similarity / temperature), as in DINO (Caron et al. 2021, arXiv 2104.14294, section
    4.1; Wu et al. 2018, arXiv 1805.01978), whose defaults these are.

    Args:
        train: features (N, D); their length does not matter.
        train_labels: integers (N,), 0 to C - 1.
        test: features (M, D), on the same device.
        classes: C; one more than the largest label when None.

    Raises UserError when there are fewer than `k` training tiles, and ValueError when features are not finite.
    """
    train, test = (normalize(torch.as_tensor(features).float(), dim=1) for features in (train, test))
    labels = torch.as_tensor(train_labels, device=train.device).long()
    if not (torch.isfinite(train).all() and torch.isfinite(test).all()):
        raise ValueError("some features are not finite: their neighbours cannot be found")
    if not 1 <= k <= len(train):
        raise UserError(f"k is {k} and there are {len(train)} labelled tiles: choose a k of 1 to {len(train)}")
    voted = one_hot(labels, classes or int(labels.max()) + 1).float()  # (N, C)
    votes = []
    for part in test.split(CHUNK):
        similarity, nearest = (part @ train.T).topk(k, dim=1)  # (m, k)
        weight = torch.softmax(similarity / temperature, dim=1)  # in proportion to exp, without its overflow
        votes.append((weight[:, :, None] * voted[nearest]).sum(dim=1))
    return torch.cat(votes)
