"""A new run that starts from the weights of another."""

import shutil

import pytest
import torch
from small_runs import assert_same_weights, method, small_loop

from hf_pathology.errors import UserError
from hf_pathology.training.log import read_log


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("first")
    small_loop(out).run()
    return out


def at_the_start(out, init_from, model=None):
    """The loop of a new run before its first step."""
    return small_loop(out, model=model, init_from=str(init_from))


def test_a_new_run_starts_with_the_weights_of_a_checkpoint_and_everything_else_at_its_beginning(first_run, tmp_path):
    before = small_loop(first_run).method
    loop = at_the_start(tmp_path, first_run / "checkpoints" / "step_00000006")
    assert loop.step == 0 and loop.loader.place == 0 and not loop.optimizer.state
    assert_same_weights(loop.method, before)
    loop.run()
    assert read_log(tmp_path / "log.jsonl")[0]["learning_rate"] == 0.0


def test_the_folder_of_a_run_stands_for_its_last_whole_checkpoint(first_run, tmp_path):
    run = shutil.copytree(first_run, tmp_path / "run")
    (run / "checkpoints" / "step_00000006" / "model.safetensors").write_bytes(b"")
    at_four = at_the_start(tmp_path / "new", run).method
    from_four = at_the_start(tmp_path / "newer", run / "checkpoints" / "step_00000004").method
    assert_same_weights(at_four, from_four)
    assert not torch.equal(at_four.student.layernorm.weight, small_loop(first_run).method.student.layernorm.weight)


def test_the_checkpoints_of_a_run_win_over_what_it_started_from(first_run, tmp_path):
    half = small_loop(tmp_path, init_from=str(first_run))
    half.run()
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000006")
    resumed = at_the_start(tmp_path, first_run)
    assert resumed.step == 4
    assert_same_weights(resumed.run(), half.method)


def test_buffers_that_follow_the_step_go_back_to_its_beginning(first_run, tmp_path):
    model = method()
    told = []
    untrained = model.student.layernorm.weight.tolist()
    model.restart = lambda: told.append(model.student.layernorm.weight.tolist())
    at_the_start(tmp_path, first_run, model)
    assert told == [model.student.layernorm.weight.tolist()]  # once, after the weights were there
    assert told != [untrained]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_dim": 32}, r"student_head.last_layer.weight_v is \(64, 16\) there and \(32, 16\) here, .*, and 3 more"),
        ({"patch_out_dim": 16}, "student_head.patch_last_layer.weight_v is missing there"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(first_run, tmp_path, changes, message):
    with pytest.raises(UserError, match=f"step_00000006 has other weights than this model: .*{message}"):
        at_the_start(tmp_path, first_run, method(**changes))


def test_a_place_without_checkpoints_and_a_damaged_one_are_refused_by_name(first_run, tmp_path):
    with pytest.raises(UserError, match="nowhere is neither a checkpoint nor the folder of a run"):
        at_the_start(tmp_path / "out", tmp_path / "nowhere")
    damaged = shutil.copytree(first_run / "checkpoints" / "step_00000006", tmp_path / "step_00000006")
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="step_00000006 is damaged"):
        at_the_start(tmp_path / "out", damaged)
