"""The signs of collapse: numbers that say whether a self-distilled encoder still tells tiles apart."""

import torch


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Mean entropy in nats of distributions (..., K): ln K when uniform (one kind of collapse), 0 when one-hot."""
    return torch.special.entr(probabilities).sum(dim=-1).mean()


def prototype_usage(probabilities: torch.Tensor) -> torch.Tensor:
    """The share of different prototypes among those that distributions (..., K) favour, of as many as there could be.

    1 when every view has a favourite of its own (or every prototype is one's favourite), near 0 when all have the same.
    """
    favourites = probabilities.flatten(0, -2).argmax(dim=-1)  # (N,)
    return torch.tensor(len(favourites.unique()) / min(len(favourites), probabilities.shape[-1]))


def feature_std(features: torch.Tensor) -> torch.Tensor:
    """Mean standard deviation of the dimensions of `features` (N, D) on the unit sphere, times sqrt(D).

    About 1 when the features spread over the whole sphere, 0 when they are all the same.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    return unit.std(dim=0).mean() * features.shape[-1] ** 0.5


def effective_rank(features: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of the normalised singular values of `features` (N, D): RankMe, arXiv 2210.02885, equation 1.

    Between 1 and min(N, D); here of the centred features, so that one common offset does not count as a dimension.
    """
    singular = torch.linalg.svdvals((features - features.mean(dim=0)).float())
    share = singular / singular.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp()


def view_agreement(features: torch.Tensor) -> torch.Tensor:
    """The share of tiles whose nearest neighbour among the other views is their own other view (kNN with k = 1).

    Args:
        features: (2, B, D), two views of the same B tiles.
    """
    first, second = torch.nn.functional.normalize(features.float(), dim=-1)
    nearest = (first @ second.T).argmax(dim=1)
    return (nearest == torch.arange(len(first), device=nearest.device)).float().mean()
