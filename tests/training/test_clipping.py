"""Norms and clipping of gradients, against the original code and by hand."""

import pytest
import torch
from originals import cases
from torch import nn
from torch.testing import assert_close

from hf_pathology.training.clipping import clip_gradients, named_gradients, tensor_norms


@pytest.mark.parametrize("case", cases("04_dino_schedules"), indirect=True)
def test_each_gradient_is_clipped_by_itself_as_in_dino(case):
    gradients = {name.removeprefix("grad/"): value for name, value in case.input.items() if name.startswith("grad/")}
    norms = tensor_norms(list(gradients.values()))
    original_norms = dict(zip(case.meta["norm_order"], case.output["norms"].tolist()))
    assert norms.tolist() == pytest.approx([original_norms[name] for name in gradients], rel=1e-6)
    clip_gradients(gradients, norms.tolist(), case.meta["clip"])
    clipped = [name for name in gradients if original_norms[name] > case.meta["clip"]]
    assert 0 < len(clipped) < len(gradients)
    for name, gradient in gradients.items():
        assert_close(gradient, case.output[f"clipped/{name}"], atol=1e-7, rtol=1e-6)


def gradients_of_norms(**norms: float) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.tensor([0.6, 0.8]) * norm for name, norm in norms.items()}


def norms_after(scope: str, max_norm: float = 3.0, **norms: float) -> list[float]:
    gradients = gradients_of_norms(**norms)
    clip_gradients(gradients, list(norms.values()), max_norm, scope)
    return [float(gradient.norm()) for gradient in gradients.values()]


def test_the_whole_model_is_clipped_by_one_norm_as_torch_does():
    norms = {"backbone__a": 8.0, "backbone__b": 1.0, "head__c": 4.0}  # together 9
    expected = [torch.zeros(2, requires_grad=True) for _ in norms]
    for tensor, gradient in zip(expected, gradients_of_norms(**norms).values()):
        tensor.grad = gradient
    torch.nn.utils.clip_grad_norm_(expected, 3.0)
    assert norms_after("model", **norms) == pytest.approx([float(tensor.grad.norm()) for tensor in expected], rel=1e-6)
    assert norms_after("model", **norms) == pytest.approx([8 / 3, 1 / 3, 4 / 3], rel=1e-5)


def test_each_module_of_the_method_is_clipped_by_its_own_norm_as_in_dinov2():
    norms = {"backbone__a": 8.0, "backbone__b": 6.0, "head__c": 2.0}  # the backbone has 10
    assert norms_after("module", **norms) == pytest.approx([2.4, 1.8, 2.0], rel=1e-5)


def test_a_norm_of_zero_to_clip_to_clips_nothing():
    assert norms_after("parameter", max_norm=0.0, a=1e6) == pytest.approx([1e6])


def test_gradients_of_zero_and_no_gradients_at_all_are_left_alone():
    assert norms_after("parameter", a=0.0) == [0.0]
    assert named_gradients(nn.Linear(2, 2)) == {}
    assert tensor_norms([]).tolist() == []
    clip_gradients({}, [], 3.0)
