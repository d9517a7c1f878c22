"""Terms that push the features of different tiles apart; lower is more spread, so they are added to a loss.

KoLeo: Sablayrolles et al. 2019 (arXiv 1806.03198), as in DINOv2 (arXiv 2304.07193). KDE: the uniformity of Wang and
Isola 2020 (arXiv 2005.10242), in the place of KoLeo as in Virchow2 (arXiv 2408.00738).
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


EPSILON = 1e-8  # of DINOv2's KoLeo; in half precision it would be zero


def koleo(features: torch.Tensor) -> torch.Tensor:
    """Minus the mean log distance of each row to its nearest neighbour on the unit sphere, a float32 scalar.

    Only the rows of this rank are neighbours, as published. Finite for equal rows, but the gradient grows with the inverse
    of the distance: two almost equal rows or three equal ones make one of 1e4 to 1e6. Where tiles repeat, as white ones
    do, prefer `kde`. Raises ValueError for less than two rows.

    Args:
        features: (B, D), of different tiles.
    """
    if len(features) < 2:
        raise ValueError(
            f"the nearest neighbour in a batch of {len(features)}: koleo needs two tiles or more per rank"
        )
    with torch.autocast(features.device.type, enabled=False):
        units = F.normalize(features.float(), dim=1, eps=EPSILON)
        with torch.no_grad():
            nearest = (units @ units.T).fill_diagonal_(-math.inf).argmax(dim=1)  # (B,)
        distances = F.pairwise_distance(units, units[nearest], eps=EPSILON)  # (B,)
        return -(distances + EPSILON).log().mean()


def kde(features: torch.Tensor, concentration: float = 5.0) -> torch.Tensor:
    """The mean log density of the rows under the kernels of all others on the unit sphere, a float32 scalar.

    mean_i log(1 / (N - 1) sum_{j != i} exp(concentration * cos(x_i, x_j))), from -concentration to concentration, and the
    latter, finite, when all rows are equal. Minimised, it spreads them; minus it, which is found in published code, would
    gather them in one place.

    The rows j are those of all ranks, the rows i those of this one: the value of the whole batch is the mean over ranks,
    and the mean of the ranks' gradients, as DDP takes it, is the gradient of that value. Every rank must call it equally
    often, with as many rows. Raises ValueError when there is only one row in all.

    Args:
        features: (B, D), of different tiles.
        concentration: of the von Mises-Fisher kernels; 5 in Virchow2.
    """
    with torch.autocast(features.device.type, enabled=False):
        units = F.normalize(features.float(), dim=1, eps=EPSILON)
        first, others = 0, units
        if dist.is_available() and dist.is_initialized():
            first, others = dist.get_rank() * len(units), _GatherRows.apply(units)  # others: (N, D)
        if len(others) < 2:
            raise ValueError(f"the density at a tile in a batch of {len(others)}: kde needs two tiles or more in all")
        itself = torch.arange(len(units), device=units.device).unsqueeze(1)  # (B, 1)
        cosines = (units @ others.T).scatter(1, first + itself, -math.inf)  # (B, N)
        return (concentration * cosines).logsumexp(dim=1).mean() - math.log(len(others) - 1)


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks, in their order; the gradient of a row is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
