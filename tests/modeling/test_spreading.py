"""KoLeo and KDE against DINOv2's numbers and loops, their sign, duplicates, and KDE over two processes."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from originals import cases
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from hf_pathology.modeling.spreading import kde, koleo


def random_rows(rows: int = 12, width: int = 16, shift: float = 0.0) -> torch.Tensor:
    """Normal vectors around a point away from the origin, which is why their cosines have a mean above zero."""
    return shift + torch.randn(rows, width, generator=torch.Generator().manual_seed(5))


def mean_cosine(features: torch.Tensor) -> float:
    units = F.normalize(features.detach(), dim=1)
    return float((units.sum(dim=0).square().sum() - len(units)) / (len(units) * (len(units) - 1)))


def nearest_distance(features: torch.Tensor) -> float:
    units = F.normalize(features.detach(), dim=1)
    return float(torch.cdist(units, units).fill_diagonal_(math.inf).amin(dim=1).mean())


def walk(term, sign: int, steps: int) -> torch.Tensor:
    """Free vectors after `steps` of gradient descent on `sign * term`."""
    features = random_rows(64, shift=0.5).requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(sign * term(features), features)
        with torch.no_grad():
            features -= gradient
    return features.detach()


@pytest.mark.parametrize("case", cases("14_dinov2_extras"), indirect=True)
def test_koleo_and_its_gradient_are_those_of_dinov2(case):
    features = case.input["koleo_x"].clone().requires_grad_()
    loss = koleo(features)
    loss.backward()
    assert_close(loss.detach(), case.output["koleo"], atol=1e-6, rtol=1e-6)
    assert_close(features.grad, case.output["koleo_grad"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", cases("14_dinov2_extras"), indirect=True)
def test_koleo_of_two_equal_rows_is_that_of_dinov2(case):
    assert_close(koleo(case.input["koleo_x_dup"]), case.output["koleo_dup"], atol=1e-3, rtol=0)


def test_koleo_is_the_naive_loop():
    features = random_rows().double()
    units = [row / row.norm() for row in features]
    nearest = [min(float((a - b).norm()) for j, b in enumerate(units) if j != i) for i, a in enumerate(units)]
    assert float(koleo(features)) == pytest.approx(-sum(math.log(d) for d in nearest) / len(nearest), abs=2e-6)


@pytest.mark.parametrize("concentration", [1.0, 5.0, 40.0])
def test_kde_is_the_naive_loop(concentration):
    features = random_rows(shift=0.5).double()
    units = [row / row.norm() for row in features]
    logs = []
    for i, a in enumerate(units):
        kernels = [math.exp(concentration * float(a @ b)) for j, b in enumerate(units) if j != i]
        logs.append(math.log(sum(kernels) / len(kernels)))
    assert float(kde(features, concentration)) == pytest.approx(sum(logs) / len(logs), rel=1e-5, abs=2e-6)


def test_the_gradient_of_kde_is_its_finite_difference():
    features, direction = random_rows(6, 5), random_rows(6, 5, shift=1.0)
    features.requires_grad_()
    (gradient,) = torch.autograd.grad(kde(features), features)
    step = 1e-2
    with torch.no_grad():
        slope = (kde(features + step * direction) - kde(features - step * direction)) / (2 * step)
    assert_close((gradient * direction).sum(), slope, atol=0, rtol=2e-3)


# The sign.


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize("term", [koleo, kde])
def test_going_downhill_lowers_the_mean_cosine_and_going_uphill_raises_it(term, steps):
    start = mean_cosine(random_rows(64, shift=0.5))
    assert mean_cosine(walk(term, 1, steps)) < start - 2e-4 < start + 2e-4 < mean_cosine(walk(term, -1, steps))


def test_kde_spreads_vectors_as_far_as_they_go_and_minus_kde_gathers_them_in_one_place():
    assert mean_cosine(walk(kde, 1, 1000)) == pytest.approx(-1 / 63, abs=1e-3)  # the lowest that 64 vectors can have
    assert mean_cosine(walk(kde, -1, 1000)) > 0.95


def test_koleo_parts_nearest_neighbours_and_minus_koleo_joins_them():
    start = nearest_distance(random_rows(64, shift=0.5))
    assert nearest_distance(walk(koleo, 1, 300)) > start + 0.2
    assert nearest_distance(walk(koleo, -1, 300)) < start - 0.2


# Numbers and batches at the edge.


@pytest.mark.parametrize("term", [koleo, kde])
@pytest.mark.parametrize("equal", [2, 3, 12])
def test_duplicates_give_finite_values_and_gradients(term, equal):
    features = random_rows()
    features[:equal] = features[0].clone()
    features.requires_grad_()
    loss = term(features)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()


def test_the_gradient_of_kde_stays_small_at_three_equal_rows_and_that_of_koleo_does_not():
    steepest = {}
    for term in (kde, koleo):
        features = random_rows()
        features[:3] = features[0].clone()
        features.requires_grad_()
        term(features).backward()
        steepest[term] = float(features.grad.norm(dim=1).max())
    assert steepest[kde] < 1 and steepest[koleo] > 1e4


def test_kde_of_equal_rows_is_the_concentration():
    assert_close(kde(torch.ones(4, 9), 7.0), torch.tensor(7.0))


@pytest.mark.parametrize("term", [koleo, kde])
def test_the_length_of_the_features_does_not_matter(term):
    features = random_rows()
    lengths = torch.linspace(0.1, 50, 12)[:, None]
    assert_close(term(lengths * features), term(features), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("term", [koleo, kde])
def test_autocast_does_not_lower_the_precision(term):
    features = random_rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = term(features)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, term(features))
    assert torch.equal(term(features.bfloat16()), term(features.bfloat16().float()))


@pytest.mark.parametrize("term", [koleo, kde])
@pytest.mark.parametrize("rows", [0, 1])
def test_less_than_two_tiles_are_refused(term, rows):
    with pytest.raises(ValueError, match=f"batch of {rows}"):
        term(random_rows(rows))


# Two processes.


def tiny_encoder() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))


def two_views(rows: int = 8) -> torch.Tensor:
    return torch.randn(2, rows, 5, generator=torch.Generator().manual_seed(11))  # (V, B, 5)


def kde_of_views(encoder: nn.Module, views: torch.Tensor) -> torch.Tensor:
    features = encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2])  # (V, B, 6)
    return sum(kde(view) for view in features)


def kde_of_two(rank: int, folder: Path) -> None:
    """One of two processes that each have half of the tiles; saves its losses and the gradients that DDP made."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    saved = []
    for rows in (8, 2):
        encoder = DistributedDataParallel(tiny_encoder())
        loss = kde_of_views(encoder, two_views(rows).chunk(2, dim=1)[rank])
        loss.backward()
        saved.append([loss.detach(), [parameter.grad for parameter in encoder.parameters()]])
    torch.save(saved, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_kde_and_the_gradients_of_one_even_with_one_tile_each(tmp_path):
    torch.multiprocessing.spawn(kde_of_two, (tmp_path,), nprocs=2)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rows, *results in zip((8, 2), *of_ranks, strict=True):
        encoder = tiny_encoder()
        loss = kde_of_views(encoder, two_views(rows))
        loss.backward()
        assert_close(torch.stack([of_rank for of_rank, _ in results]).mean(), loss.detach())
        for _, gradients in results:
            for ours, parameter in zip(gradients, encoder.parameters(), strict=True):
                assert parameter.grad.abs().max() > 1e-4
                assert_close(ours, parameter.grad, atol=1e-6, rtol=1e-5)
