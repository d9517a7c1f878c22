"""What our losses and centres have to do with DINOv2's, in its numbers (see `tests/originals.py`).

Sinkhorn and KoLeo, which are the same, are in `test_sinkhorn.py` and `test_spreading.py`.
"""

import pytest
import torch
from originals import Case, cases
from torch.testing import assert_close

from hf_pathology.modeling.self_distillation import (
    RunningCenter,
    hidden_patch_loss,
    teacher_probabilities,
    view_loss,
)


LOSS = {"atol": 0, "rtol": 1e-6}
GRADIENT = {"atol": 1e-6, "rtol": 1e-5}
CASE = pytest.mark.parametrize("case", cases("14_dinov2_extras"), indirect=True)


def sum_over_all_pairs(students: list[torch.Tensor], teachers: list[torch.Tensor], temperature: float) -> torch.Tensor:
    """DINOv2's loss: a sum over all pairs of scores (B, K) and probabilities (B, K), each a mean over its rows."""
    total = torch.zeros(())
    for student in students:
        for teacher in teachers:
            for row, target in zip(student, teacher):
                total = total - (target * (row / temperature).log_softmax(dim=0)).sum() / len(student)
    return total


def dino_views(case: Case) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Scores (3, B, K) that a gradient is wanted of, probabilities (2, B, K), and the student's temperature."""
    students = torch.stack([case.input[f"student_{view}"] for view in range(3)]).requires_grad_()
    return students, torch.stack([case.input[f"teacher_prob_{view}"] for view in range(2)]), case.meta["student_temp"]


@CASE
def test_the_sum_over_all_pairs_of_views_is_dinov2s(case):
    students, teachers, temperature = dino_views(case)
    loss = sum_over_all_pairs(list(students), list(teachers), temperature)
    loss.backward()
    assert_close(loss.detach(), case.output["dinov2_dino_loss"], **LOSS)
    assert_close(students.grad[0], case.output["dinov2_dino_loss_grad_student_0"], **GRADIENT)


@CASE
def test_dinov2s_sum_is_four_pairs_of_other_views_and_two_of_the_same(case):
    """The mean over the 2 x 3 - 2 pairs of different views, times 4, and what it leaves out: each view with itself."""
    students, teachers, temperature = dino_views(case)
    other = 4 * view_loss(students, teachers, temperature)
    same = 2 * view_loss(
        students[:2].flip(0), teachers, temperature
    )  # swapped, so that only equal views are not skipped
    (other + same).backward()
    assert_close((other + same).detach(), case.output["dinov2_dino_loss"], **LOSS)
    assert_close(students.grad[0], case.output["dinov2_dino_loss_grad_student_0"], **GRADIENT)


@CASE
@pytest.mark.parametrize("shifts", [[], [1], [1, 2, 3, 4]], ids=["no local view", "one", "four"])
def test_what_dinov2_trains_on_is_our_mean_over_pairs_of_different_views(case, shifts):
    """It calls its sum twice: local views with both teachers, and, weighted by 2, both global views in one batch with the
    teachers in swapped order; both are divided by the number of pairs, 2 L + 2."""
    students, teachers, temperature = dino_views(case)
    locals_ = [students[2].roll(shift, dims=1) for shift in shifts]  # L of (B, K), all different
    local = sum_over_all_pairs(locals_, list(teachers), temperature)
    global_ = sum_over_all_pairs([students[:2].flatten(0, 1)], [teachers.flip(0).flatten(0, 1)], temperature)
    pairs = 2 * len(locals_) + 2
    ours = view_loss(torch.stack([*students[:2], *locals_]), teachers, temperature)
    assert_close(ours, (local + 2 * global_) / pairs, **LOSS)


@CASE
def test_the_loss_of_hidden_patches_and_its_gradient_are_dinov2s(case):
    hidden = case.input["patch_mask"]  # (4, 9)
    student = case.input["patch_student"].clone().requires_grad_()
    teacher = case.input["patch_teacher_prob"]
    loss = hidden_patch_loss(student[hidden], teacher[hidden], hidden, case.meta["student_temp"])
    loss.backward()
    assert_close(loss.detach(), case.output["ibot_patch_loss"], **LOSS)
    assert_close(loss.detach(), case.output["ibot_patch_loss_forward_masked"], **LOSS)
    assert_close(student.grad, case.output["ibot_patch_loss_grad"], **GRADIENT)


@CASE
@pytest.mark.parametrize("kind, shape", [("", (1, 20)), ("patch_", (1, 1, 20))])
def test_targets_with_a_running_centre_are_dinov2s_which_moves_it_at_the_next_call(case, kind, shape):
    center = RunningCenter(shape, case.meta["center_momentum"])
    temperature = torch.tensor(case.meta["teacher_temp"])
    for call in range(2):
        scores = case.input[f"{kind}center_in_{call}"]
        targets = teacher_probabilities(scores, center.value, temperature)
        assert_close(targets, case.output[f"{kind}softmax_center_{call}"], atol=1e-7, rtol=1e-5)
        rows = scores.flatten(0, -2)
        center.add(rows.sum(dim=0), len(rows))
        center.step()
    assert_close(center.value, case.output[f"{kind}center_final"], atol=1e-7, rtol=1e-6)
