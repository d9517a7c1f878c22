"""The loop: it learns, accumulates, resumes to the same bits, refuses what is not finite, and stops when asked."""

import os
import shutil
import signal

import pytest
import torch
from small_runs import Batches, assert_same_weights, method, small_loop

from hf_pathology.errors import UserError
from hf_pathology.training.interrupt import Interrupted
from hf_pathology.training.log import read_log


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path):
    straight = small_loop(tmp_path / "straight").run()
    small_loop(tmp_path / "cut").run()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000006")  # as if killed after step 4
    torch.manual_seed(99)  # the state of the generators must come from the checkpoint
    resumed = small_loop(tmp_path / "cut")
    assert resumed.step == 4
    assert_same_weights(resumed.run(), straight)
    assert [record["step"] for record in read_log(tmp_path / "cut" / "log.jsonl")] == list(range(6))


def test_a_finished_run_is_not_trained_again(tmp_path):
    finished = small_loop(tmp_path).run()
    batches = Batches()
    assert_same_weights(small_loop(tmp_path, batches).run(), finished)
    assert batches.place == 6


def test_a_student_learns_to_say_what_a_fixed_teacher_says(tmp_path):
    class Same(Batches):
        def __iter__(self):
            while True:
                self.place = 0
                yield next(super().__iter__())

    model = method(teacher_momentum=1.0, center_momentum=1.0, patch_center_momentum=1.0, drop_path_rate=0.0)
    small_loop(tmp_path, Same(), model, steps=200, learning_rate=0.2, checkpoint_every=300, panel_every=1).run()
    records = read_log(tmp_path / "log.jsonl")
    teacher_entropy = records[0]["teacher_entropy"]  # the least that the loss of the class tokens can be
    assert records[-1]["cls_loss"] - teacher_entropy < 0.2 * (records[0]["cls_loss"] - teacher_entropy)


def test_two_micro_batches_are_one_batch_of_twice_the_size(tmp_path):
    class Halves(Batches):
        """The batches of `Batches(8)` in two halves."""

        def __iter__(self):
            for whole in super().__iter__():
                for half in (slice(0, 4), slice(4, 8)):
                    yield {
                        name: value[half] if name in ("slide", "xy") else value[:, half]
                        for name, value in whole.items()
                    }

    one = small_loop(tmp_path / "one", Batches(8), method(drop_path_rate=0.0), batch_size=8).run()
    two = small_loop(tmp_path / "two", Halves(8), method(drop_path_rate=0.0), accumulation=2).run()
    for (name, first), second in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, atol=2e-4, rtol=2e-3, msg=name)
    assert one.center.value.abs().max() > 0
    torch.testing.assert_close(one.center.value, two.center.value, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run_and_the_same_command_goes_on(tmp_path, number):
    straight = small_loop(tmp_path / "straight").run()

    def interrupt(place):
        if place == 3:  # fetched while the step before is computed
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="stopped after step 3") as stopped:
        small_loop(tmp_path / "cut", Batches(on_batch=interrupt)).run()
    assert stopped.value.signal == number
    assert_same_weights(small_loop(tmp_path / "cut").run(), straight)


def test_the_loader_is_closed_when_the_run_fails(tmp_path):
    class Closing(Batches):
        closed = False

        def __iter__(self):
            try:
                yield from super().__iter__()
            finally:
                self.closed = True

    batches = Closing(broken=range(9))
    with pytest.raises(UserError) as error:
        small_loop(tmp_path, batches, max_non_finite=1).run()
    assert "not finite" in str(error.value) and batches.closed


def test_a_batch_is_fetched_while_the_one_before_is_computed_and_is_not_lost_when_the_run_stops(tmp_path):
    def interrupt(place):
        fetched.append((place, loop.step))
        if place == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    fetched = []
    loop = small_loop(tmp_path, Batches(on_batch=interrupt), accumulation=2)
    with pytest.raises(Interrupted, match="stopped after step 2"):
        loop.run()
    assert fetched == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]
    fetched.clear()
    loop = small_loop(tmp_path, Batches(on_batch=lambda place: fetched.append(place)), accumulation=2)
    loop.run()
    assert fetched == list(range(4, 12))  # the fifth again, and none beyond the last
