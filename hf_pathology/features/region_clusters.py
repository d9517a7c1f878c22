"""Clusters of regions within slides, and which slides and clusters are alike (SLPD: Yu et al. 2023, arXiv 2307.08259)."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans


NONE = -1  # the cluster of a region whose slide has too few regions to be clustered


@dataclass(frozen=True)
class RegionClusters:
    """What SLPD's losses need to know of a cohort of S slides.

    Attributes:
        cluster_of: of each region, int64 (regions,), NONE where its slide is not clustered.
        prototypes: unit vectors, float32 (S, K, D); zeros for slides that are not clustered.
        neighbours: the slides most similar to each, most similar first, int64 (S, r).
        matched: for each prototype the one of each of these slides that is most similar to it, int64 (S, K, r).
    """

    cluster_of: np.ndarray
    prototypes: np.ndarray
    neighbours: np.ndarray
    matched: np.ndarray


def cluster_slides(
    features: np.ndarray,
    slide_of: np.ndarray,
    *,
    clusters: int,
    min_regions: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of each region, int64 (regions,), and the prototypes of the slides, float32 (S, K, D), by k-means.

    Both are zero for slides with fewer than `min_regions` regions, and for those that other processes cluster.

    Args:
        features: of regions, unit vectors (regions, D).
        slide_of: the slide of each region, int64 (regions,).
        clusters: K, of each slide.
        seed: of k-means; each slide has its own generator, whichever process clusters it.
        share: this process, and of how many.
    """
    order = np.argsort(slide_of, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(slide_of))[:-1])  # of each slide
    cluster_of = np.zeros(len(features), np.int64)
    prototypes = np.zeros((len(members), clusters, features.shape[1]), np.float32)
    rank, world = share
    for slide in range(rank, len(members), world):
        own = members[slide]
        if len(own) >= min_regions:
            cluster_of[own], prototypes[slide] = cluster_slide(features[own], clusters, seed)
    return cluster_of, prototypes


def match_slides(
    cluster_of: np.ndarray, prototypes: np.ndarray, usable: np.ndarray, neighbours: int
) -> RegionClusters:
    """The clusters with the slides and prototypes that are alike; `usable` (S,) says which slides have prototypes."""
    nearest = nearest_slides(slide_similarity(prototypes, usable), neighbours)
    return RegionClusters(cluster_of, prototypes, nearest, matched_prototypes(prototypes, nearest))


def cluster_slide(features: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of each region (n,) and the clusters' means as unit vectors (K, D), by the best of 5 runs of k-means."""
    found = KMeans(clusters, n_init=5, max_iter=10, random_state=seed).fit(features)
    return found.labels_, unit(found.cluster_centers_).astype(np.float32)


def slide_similarity(prototypes: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """How alike slides are, float64 (S, S): the sum of cosines of the best matching of their prototypes (S, K, D).

    -inf where one of the two is not `usable` (S,).
    """
    similarity = np.full((len(prototypes), len(prototypes)), -np.inf)
    which = np.flatnonzero(usable)
    for place, one in enumerate(which):
        others = which[place:]
        cosines = np.einsum("kd,old->okl", prototypes[one], prototypes[others])  # (others, K, K)
        best = [each[linear_sum_assignment(each, maximize=True)].sum() for each in cosines]
        similarity[one, others] = similarity[others, one] = best
    return similarity


def nearest_slides(similarity: np.ndarray, neighbours: int) -> np.ndarray:
    """The most similar other slides of each, int64 (S, r), most similar first."""
    others = similarity.copy()
    np.fill_diagonal(others, -np.inf)
    return np.argsort(-others, axis=1, kind="stable")[:, :neighbours]


def matched_prototypes(prototypes: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """For each prototype (S, K, D) the most similar one of each of its slide's `neighbours` (S, r), int64 (S, K, r)."""
    return np.stack(
        [
            np.einsum("kd,rld->krl", own, prototypes[others]).argmax(axis=-1)
            for own, others in zip(prototypes, neighbours)
        ]
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    """`vectors` (..., D) with length 1; zeros stay zeros."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(length, 1e-12)
