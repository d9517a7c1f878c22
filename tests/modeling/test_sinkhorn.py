"""Sinkhorn-Knopp against DINOv2's numbers and a loop in float64, at extreme scores, and over two processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from originals import cases
from torch.testing import assert_close

from hf_pathology.modeling.sinkhorn import sinkhorn


PARITY = {"atol": 1e-7, "rtol": 1e-5}
SPLITS = [(6, 6), (7, 5), (12, 0), (0, 0)]  # rows of the two ranks


def published(scores: torch.Tensor, temperature: float, iterations: int) -> torch.Tensor:
    """The published form with its constants, in float64."""
    q = (scores.double() / temperature).exp().T  # (K, B)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True)
        q /= q.shape[0]
        q /= q.sum(dim=0, keepdim=True)
        q /= q.shape[1]
    return (q * q.shape[1]).T


def random_scores(rows: int = 12, prototypes: int = 20, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("iterations", [1, 3, 5])
@pytest.mark.parametrize("case", cases("14_dinov2_extras"), indirect=True)
def test_targets_of_class_tokens_are_those_of_dinov2(case, iterations):
    ours = sinkhorn(case.input["teacher"], case.meta["teacher_temp"], iterations)
    assert_close(ours, case.output[f"sinkhorn_cls_iter{iterations}"], **PARITY)


@pytest.mark.parametrize("name", ["sinkhorn_patch", "sinkhorn_patch_n_masked_Bminus3"])
@pytest.mark.parametrize("case", cases("14_dinov2_extras"), indirect=True)
def test_targets_of_patches_are_those_of_dinov2_whatever_number_of_patches_it_is_told(case, name):
    assert_close(sinkhorn(case.input["teacher"], case.meta["teacher_temp"]), case.output[name], **PARITY)


@pytest.mark.parametrize("rows, prototypes", [(3, 50), (12, 20), (200, 7)])
@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_the_constants_of_the_published_form_change_nothing(rows, prototypes, iterations):
    scores = random_scores(rows, prototypes)
    expected = published(scores, 0.07, iterations)
    assert_close(sinkhorn(scores, torch.tensor(0.07), iterations).double(), expected, atol=2e-6, rtol=2e-5)


def test_rows_sum_to_one_and_many_iterations_use_all_prototypes_alike():
    targets = sinkhorn(random_scores(spread=0.3), 0.1, iterations=300)
    assert_close(targets.sum(dim=1), torch.ones(12))
    assert_close(targets.sum(dim=0), torch.full((20,), 12 / 20))


def test_a_common_offset_of_the_scores_changes_nothing():
    scores = random_scores().double().mul(64).round() / 64  # so that adding is exact
    assert torch.equal(sinkhorn(scores + 4096, 0.5), sinkhorn(scores, 0.5))


@pytest.mark.parametrize("spread", [10.0, 1000.0])
def test_scores_whose_exponential_has_no_float_give_distributions(spread):
    scores = random_scores(spread=spread)
    assert (scores / 0.04).amax() > 88.7
    targets = sinkhorn(scores, 0.04, iterations=10)
    assert targets.isfinite().all()
    assert_close(targets.sum(dim=1), torch.ones(12))


def test_a_row_and_a_prototype_far_below_the_others_have_their_targets():
    scores = random_scores(6, 4, spread=0.05)
    scores[2] -= 30.0
    scores[:, 1] -= 20.0
    expected = published(scores, 0.1, 3)
    assert_close(sinkhorn(scores, 0.1).double(), expected, atol=2e-6, rtol=2e-5)


def test_targets_are_float32_without_gradient_and_the_scores_stay_as_they_were():
    scores = random_scores().bfloat16().requires_grad_()
    before = scores.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = sinkhorn(scores, 0.07)
    assert targets.dtype == torch.float32 and not targets.requires_grad
    assert torch.equal(targets, sinkhorn(before.float(), 0.07))
    assert torch.equal(scores, before)


def test_no_rows_give_no_targets():
    assert sinkhorn(torch.empty(0, 5), 0.07).shape == (0, 5)


def test_no_iterations_are_refused():
    with pytest.raises(ValueError, match="0 iterations"):
        sinkhorn(random_scores(), 0.07, iterations=0)


def targets_of_two(rank: int, folder: Path) -> None:
    """One of two processes that each have part of the rows; saves its targets for each of the splits."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    targets = []
    for rows in SPLITS:
        part = random_scores(spread=3.0)[: sum(rows)].split(rows)[rank]
        targets.append(sinkhorn(part, 0.04))
    torch.save(targets, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_any_share_of_the_rows_make_the_targets_of_one(tmp_path):
    torch.multiprocessing.spawn(targets_of_two, (tmp_path,), nprocs=2)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rows, *parts in zip(SPLITS, *of_ranks):
        assert [len(part) for part in parts] == list(rows)
        assert_close(torch.cat(parts), sinkhorn(random_scores(spread=3.0)[: sum(rows)], 0.04))
