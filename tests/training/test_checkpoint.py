"""Checkpoints: damage of any kind is found, what is to stay stays, and a run goes on only as itself."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from small_runs import Batches, assert_same_weights, method, small_loop

from hf_pathology.errors import UserError
from hf_pathology.training.integrity import damage, sealed_index
from hf_pathology.training.interrupt import Interrupted
from hf_pathology.training.log import read_log
from hf_pathology.training.options import TrainingOptions


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of six steps with checkpoints after two, four and six."""
    out = tmp_path_factory.mktemp("run")
    small_loop(out, keep_checkpoints=3).run()
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_a_number(file: Path) -> None:
    """Damage that leaves JSON readable."""
    file.write_text(file.read_text().replace("6", "5"))


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[: -file.stat().st_size // 3]),
    "empty": lambda file: file.write_bytes(b""),
    "not there": Path.unlink,
}
FILES = ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "data_0.json", "checkpoint.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", DAMAGES.values(), ids=DAMAGES)
def test_damage_to_any_file_is_named_and_the_checkpoint_before_it_taken(run, name, harm):
    harm(run / "checkpoints" / "step_00000006" / name)
    with pytest.warns(UserWarning, match=rf"step_00000006 is damaged \({name}\): going on .* step_00000004"):
        assert small_loop(run).step == 4


@pytest.mark.parametrize("name", ["data_0.json", "checkpoint.json"])
def test_another_number_in_a_file_that_can_still_be_read_is_damage(run, name):
    change_a_number(run / "checkpoints" / "step_00000006" / name)
    with pytest.warns(UserWarning, match=rf"step_00000006 is damaged \({name}\)"):
        assert small_loop(run).step == 4


def test_a_run_that_fell_back_ends_with_the_same_bits_and_without_damage(finished, run):
    flip_a_bit(run / "checkpoints" / "step_00000006" / "optimizer.bin")
    flip_a_bit(run / "checkpoints" / "step_00000004" / "model.safetensors")
    with pytest.warns(UserWarning) as warned:
        loop = small_loop(run)
    assert [str(warning.message).count("step_00000002") for warning in warned] == [1, 1] and loop.step == 2
    resumed = loop.run()
    assert_same_weights(resumed, small_loop(finished).method)
    assert not any(damage(path) for path in (run / "checkpoints").iterdir())


def test_a_run_all_of_whose_checkpoints_are_damaged_does_not_silently_start_again(run):
    for path in (run / "checkpoints").iterdir():
        flip_a_bit(path / "checkpoint.json")
    every = r"step_00000006 \(checkpoint.json\), step_00000004 \(checkpoint.json\), step_00000002 \(checkpoint.json\)"
    with pytest.raises(UserError, match=f"are damaged: {every}; give one back"):
        small_loop(run)
    assert len(read_log(run / "log.jsonl")) == 6


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_only_the_last_checkpoints_stay_and_what_a_killed_process_left_goes(tmp_path):
    left = tmp_path / "checkpoints" / ".step_00000003.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    small_loop(tmp_path, keep_checkpoints=2).run()
    assert names(tmp_path) == ["step_00000004", "step_00000006"]


def test_each_nth_checkpoint_stays_for_good(tmp_path):
    small_loop(tmp_path, keep_checkpoints=1, checkpoint_every=1, keep_every=2, steps=7).run()
    assert names(tmp_path) == [f"step_{step:08d}" for step in (2, 4, 6, 7)]
    with pytest.raises(UserError, match="keep_every is 3: it must be a multiple of checkpoint_every, 2"):
        TrainingOptions(steps=1, batch_size=1, checkpoint_every=2, keep_every=3)


def test_a_damaged_checkpoint_ahead_does_not_push_out_whole_ones(run):
    def interrupt(place):
        if place == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    flip_a_bit(run / "checkpoints" / "step_00000006" / "model.safetensors")
    with pytest.warns(UserWarning, match="step_00000006 is damaged"):
        loop = small_loop(run, Batches(on_batch=interrupt), keep_checkpoints=2)
    with pytest.raises(Interrupted, match="stopped after step 5"):
        loop.run()
    assert names(run) == ["step_00000004", "step_00000005", "step_00000006"]


def test_a_run_with_other_options_is_refused_with_both_hashes(run):
    with pytest.raises(UserError, match=r"learning_rate 0.05 -> 0.01; their hash \w{12} -> \w{12}\): give them back"):
        small_loop(run, learning_rate=0.01)
    options = TrainingOptions(steps=6, batch_size=4, learning_rate=0.05, warmup_steps=2)
    with pytest.raises(UserError, match="stain not set -> h&e"):
        small_loop(run, config={**options.deciding(), "stain": "h&e"})
    with pytest.raises(UserError, match="seed 0 -> not set"):
        small_loop(run, config={name: value for name, value in options.deciding().items() if name != "seed"})


def test_the_precision_belongs_to_what_decides(run):
    with pytest.raises(UserError, match="mixed_precision no -> bf16"):
        small_loop(run, mixed_precision="bf16")


def test_how_a_run_is_watched_and_kept_may_change_when_it_goes_on(run):
    changes = {"log_every": 3, "panel_every": 7, "checkpoint_every": 3, "keep_checkpoints": 1, "keep_every": 3}
    assert small_loop(run, **changes, export_every=2, judge_every=2, max_non_finite=9).step == 6


def test_the_same_number_of_tiles_a_step_may_be_reached_in_another_way(run):
    assert small_loop(run, batch_size=2, accumulation=2).step == 6


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"batch_size": 2}, "set --accumulation 2 to have 4 tiles a step again"),
        ({"batch_size": 3, "accumulation": 2}, "set --batch_size 2 to have 4 tiles a step again"),
        ({"batch_size": 8}, "set --batch_size 4 to have 4 tiles a step again"),
        ({"batch_size": 3, "accumulation": 3}, "set --batch_size 4 --accumulation 1 to have 4 tiles a step again"),
    ],
)
def test_another_number_of_tiles_a_step_is_refused_with_the_options_that_mend_it(run, changes, remedy):
    tiles = changes["batch_size"] * changes.get("accumulation", 1)
    with pytest.raises(UserError, match=rf"tiles_a_step 4 -> {tiles}; .*: with 1 process, {remedy}, or choose a new"):
        small_loop(run, **changes)


def test_a_checkpoint_of_another_layout_goes_on_with_generators_seeded_anew_and_says_so(run, capsys):
    folder = run / "checkpoints" / "step_00000006"
    (folder / "data_1.json").write_text(json.dumps({"place": 6}))  # as if two processes had written it
    reseal(folder, {**json.loads((folder / "checkpoint.json").read_text()), "world_size": 2})
    small_loop(run)
    first = torch.rand(1)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert (
        "was written by 2 process(es) on cpu and goes on with 1 on cpu: the random generators are seeded anew" in said
    )
    torch.manual_seed(99)
    small_loop(run)
    assert torch.equal(torch.rand(1), first)


def reseal(folder: Path, content: dict) -> None:
    (folder / "checkpoint.json").unlink()
    facts = {name: value for name, value in content.items() if name not in ("files", "seal")}
    (folder / "checkpoint.json").write_text(json.dumps(sealed_index(folder, facts)))


def test_random_states_that_cannot_be_restored_are_an_error_and_not_passed_over(run):
    folder = run / "checkpoints" / "step_00000006"
    # Python's and numpy's states are no tensors; the file was written by this test's own run.
    states = torch.load(folder / "random_states_0.pkl", weights_only=False)
    del states["torch_manual_seed"]
    torch.save(states, folder / "random_states_0.pkl")
    reseal(folder, json.loads((folder / "checkpoint.json").read_text()))
    with pytest.raises(KeyError, match="torch_manual_seed"):
        small_loop(run)


def test_the_number_of_threads_comes_back_with_the_checkpoint(run):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        small_loop(run)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16"},
        {"optimizer": "sgd"},
        {"optimizer": "lars"},
        {"layer_decay": 0.8, "clip_scope": "module"},
    ],
    ids=["bf16", "sgd", "lars", "layer decay"],
)
def test_every_way_to_train_goes_on_with_the_same_bits(tmp_path, changes):
    straight = small_loop(tmp_path / "straight", **changes).run()
    untrained = method()
    assert not torch.equal(untrained.student.layernorm.weight, straight.student.layernorm.weight)
    small_loop(tmp_path / "cut", **changes).run()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000006")
    torch.manual_seed(99)
    resumed = small_loop(tmp_path / "cut", **changes)
    assert resumed.step == 4
    assert_same_weights(resumed.run(), straight)
