"""Clusters of regions within slides, and which slides and clusters are alike (SLPD: Yu et al. 2023, arXiv 2307.08259)."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from ..errors import UserError


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


def cluster_regions(
    features: np.ndarray, slide_of: np.ndarray, *, clusters: int, min_regions: int, neighbours: int, seed: int
) -> RegionClusters:
    """Clusters the regions of each slide by k-means, and finds the slides that are alike.

    Args:
        features: of regions, (regions, D), made unit vectors first.
        slide_of: the slide of each region, int64 (regions,).
        clusters: K, of each slide.
        min_regions: slides with fewer are not clustered.
        neighbours: r, similar slides of each slide.
        seed: of k-means; each slide has its own generator, whichever process clusters it.

    Raises UserError when there are more clusters than regions, or too few slides to have that many neighbours.
    """
    if clusters > min_regions:
        raise UserError(
            f"num_clusters is {clusters} and min_regions {min_regions}: a slide must have a region for each cluster"
        )
    features = unit(features)
    slides = int(slide_of.max()) + 1
    cluster_of = np.full(len(features), NONE)
    prototypes = np.zeros((slides, clusters, features.shape[1]), np.float32)
    usable = np.bincount(slide_of, minlength=slides) >= min_regions
    if usable.sum() <= neighbours:
        raise UserError(
            f"{usable.sum()} slides have {min_regions} regions or more: too few for {neighbours} neighbours of each; "
            "lower --min_regions, or use more slides"
        )
    for slide in np.flatnonzero(usable):
        own = np.flatnonzero(slide_of == slide)
        cluster_of[own], prototypes[slide] = cluster_slide(features[own], clusters, seed)
    similarity = slide_similarity(prototypes, usable)
    nearest = nearest_slides(similarity, neighbours)
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
