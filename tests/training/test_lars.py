"""LARS against the original code, and where a norm is zero."""

import pytest
import torch
from originals import cases
from torch import nn
from torch.testing import assert_close

from hf_pathology.training.lars import Lars


@pytest.mark.parametrize("case", cases("04_dino_lars"), indirect=True)
def test_three_steps_leave_the_parameters_where_dino_leaves_them(case):
    parameters = {name: nn.Parameter(value.clone()) for name, value in case.state.items()}
    optimizer = Lars(parameters.values(), **case.meta["args"])
    for step in range(3):
        for name, parameter in parameters.items():
            parameter.grad = case.input[f"grad_{step}/{name}"].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            assert_close(parameter.detach(), case.output[f"param_after_{step}/{name}"], atol=1e-7, rtol=1e-6)


def test_a_weight_or_an_update_of_zero_is_not_scaled_and_stays_finite():
    weight, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    weight.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    Lars([weight, still], lr=0.5, momentum=0.0).step()
    assert_close(weight.detach(), torch.full((2, 2), -0.5))
    assert_close(still.detach(), torch.ones(2, 2))


def test_a_parameter_without_a_gradient_is_neither_moved_nor_decayed():
    frozen, moved = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    moved.grad = torch.ones(2, 2)
    Lars([frozen, moved], lr=0.5, weight_decay=0.1).step()
    assert_close(frozen.detach(), torch.ones(2, 2))
    assert (moved < 1).all()


def test_its_state_goes_through_a_checkpoint():
    def steps(optimizer, parameter, count):
        for _ in range(count):
            parameter.grad = parameter.detach() * 2
            optimizer.step()

    straight, cut = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    one, before = Lars([straight], lr=0.5), Lars([cut], lr=0.5)
    steps(one, straight, 4)
    steps(before, cut, 2)
    after = Lars([cut], lr=0.5)
    after.load_state_dict(before.state_dict())
    steps(after, cut, 2)
    assert torch.equal(straight, cut)
