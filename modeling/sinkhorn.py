"""Sinkhorn-Knopp: the teacher's scores made targets that use all prototypes alike, over the batch of all ranks.

Caron et al. 2020 (SwAV, arXiv 2006.09882), section 3.1; used for both heads of DINOv2 (arXiv 2304.07193), section 4.
"""

import math

import torch
import torch.distributed as dist


@torch.no_grad()
def sinkhorn(scores: torch.Tensor, temperature: torch.Tensor | float, iterations: int = 3) -> torch.Tensor:
    """Distributions over prototypes (B, K), float32, without gradient: each row sums to 1, the columns nearly alike.

    From exp(scores / temperature), each iteration scales every prototype, then every row, to the sum 1. The published
    form scales to 1 / K and 1 / B and multiplies by B at the end; each scaling undoes the constants of the one before,
    so they are left out, and a batch of two ranks gives what it gives on one.

    Every rank must call it equally often, with the same K; B may differ between ranks and may be zero. Raises
    ValueError for less than one iteration.

    Args:
        scores: (B, K) of the rows of this rank.
        temperature: divides the scores.
    """
    if iterations < 1:
        raise ValueError(f"Sinkhorn-Knopp with {iterations} iterations makes no distributions: use 1 or more")
    logits = scores.float() / temperature  # (B, K)
    # The first scaling is done on logarithms: no score is too high or too low, and an entry of each prototype is 1 / B or
    # more. From there on no sum is below 1 / (B K), with B the rows of all ranks: nothing is divided by zero.
    highest = logits.amax(dim=0) if len(logits) else logits.new_full(logits.shape[1:], -math.inf)  # (K,)
    logits -= _over_ranks(highest, maximum=True)
    logits -= _over_ranks(logits.exp().sum(dim=0)).log()
    probabilities = logits.softmax(dim=1)
    for _ in range(iterations - 1):
        probabilities /= _over_ranks(probabilities.sum(dim=0))
        probabilities /= probabilities.sum(dim=1, keepdim=True)
    return probabilities


def _over_ranks(values: torch.Tensor, maximum: bool = False) -> torch.Tensor:
    """The sum, or the maximum, of `values` over all ranks; they are overwritten."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return values
