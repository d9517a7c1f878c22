"""Steps that are not taken: nothing moves, the tiles are named, and a run gives up with the cause."""

import json

import pytest
import torch
from small_runs import Batches, method, small_loop

from hf_pathology.errors import UserError
from hf_pathology.training.log import read_log


def with_a_broken_gradient(model, *steps):
    """The `model`, one of whose gradients is infinite at the given steps while its loss is not."""
    calls = iter(range(10**6))
    weight = model.student.layers[0].layernorm_before.weight
    weight.register_hook(lambda gradient: gradient * (float("inf") if next(calls) in steps else 1.0))
    return model


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_moves_nothing_and_names_its_tiles(tmp_path, what):
    model = method(head_norm="bn")  # whose running statistics a forward pass moves
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if what == "loss":
        small_loop(tmp_path, Batches(broken=[0]), model, steps=1, checkpoint_every=10).run()
    else:
        small_loop(tmp_path, None, with_a_broken_gradient(model, 0), steps=1, checkpoint_every=10).run()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    (names,) = (tmp_path / "non_finite").iterdir()
    assert json.loads(names.read_text())[0] == {"slide": ["a.svs"] * 4, "xy": [[0, 0]] * 4}
    (record,) = read_log(tmp_path / "log.jsonl")
    assert record["finite"] == 0.0 and (record["loss"] > 0) == (what == "gradient")


def test_statistics_of_batch_norms_go_back_to_the_last_step_that_was_taken(tmp_path):
    def statistics(steps, broken):
        model = method(head_norm="bn", drop_path_rate=0.0)
        small_loop(tmp_path / f"{steps}", Batches(broken=broken), model, steps=steps, warmup_steps=0).run()
        return {name: value for name, value in model.state_dict().items() if "running" in name or "batches" in name}

    two, four = statistics(2, broken=[]), statistics(4, broken=[2, 3])
    assert two and all(value.isfinite().all() for value in four.values())
    for name, value in two.items():
        if "batches" in name:
            assert torch.equal(value, four[name]), name


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_stops_after_too_many_steps_in_a_row_that_are_not_finite_and_says_what_was_not(tmp_path, what):
    def run(name, *steps):
        batches = Batches(broken=steps if what == "loss" else ())
        model = method() if what == "loss" else with_a_broken_gradient(method(), *steps)
        small_loop(tmp_path / name, batches, model, max_non_finite=3).run()

    run("few", 1, 2, 4)
    with pytest.raises(UserError, match=f"the {what} was not finite 3 steps in a row, last at step 3"):
        run("many", 1, 2, 3)
    assert len(list((tmp_path / "many" / "non_finite").iterdir())) == 3


def test_one_broken_micro_batch_of_several_spoils_the_step_and_all_its_tiles_are_named(tmp_path):
    small_loop(tmp_path, Batches(broken=[1]), accumulation=2, steps=2).run()
    (names,) = (tmp_path / "non_finite").iterdir()
    assert [batch["xy"][0][0] for batch in json.loads(names.read_text())] == [0, 1]
    assert [record["finite"] for record in read_log(tmp_path / "log.jsonl")] == [0.0, 1.0]
