import json
import os
import shutil
import signal

import pytest
import torch
from accelerate import Accelerator
from transformers import ViTConfig

from hf_pathology.errors import UserError
from hf_pathology.modeling.configuration_ibot import IbotConfig
from hf_pathology.modeling.modeling_ibot import IbotForPreTraining
from hf_pathology.training.interrupt import Interrupted
from hf_pathology.training.log import read_log
from hf_pathology.training.loop import TrainingLoop, TrainingOptions


def method(**changes) -> IbotForPreTraining:
    torch.manual_seed(0)
    trunk = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    options = {"out_dim": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16, "drop_path_rate": 0.2, **changes}
    return IbotForPreTraining(IbotConfig(trunk, **options))


class Batches:
    """An endless, resumable stream of random views."""

    def __init__(self, batch_size=4, broken=(), on_batch=None):
        self.place, self.batch_size, self.broken, self.on_batch = 0, batch_size, broken, on_batch

    def __iter__(self):
        while True:
            views = torch.Generator().manual_seed(self.place)
            batch = {
                "global_views": torch.randn(2, self.batch_size, 3, 32, 32, generator=views),
                "hidden": torch.rand(2, self.batch_size, 4, 4, generator=views) < 0.3,
                "local_views": torch.randn(2, self.batch_size, 3, 16, 16, generator=views),
                "slide": ["a.svs"] * self.batch_size,
                "xy": torch.full((self.batch_size, 2), self.place),
            }
            if self.place in self.broken:
                batch["global_views"].fill_(float("nan"))
            if self.on_batch:
                self.on_batch(self.place)
            self.place += 1
            yield batch

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, states):
        self.place = states[0]["place"]


def to_inputs(batch):
    return {name: batch[name] for name in ("global_views", "hidden", "local_views")}


def loop(out, batches=None, model=None, config=None, **changes):
    options = {"steps": 6, "batch_size": 4, "learning_rate": 0.05, "warmup_steps": 2, "log_every": 1, **changes}
    options = TrainingOptions(**{"panel_every": 3, "checkpoint_every": 2, "cpu": True, **options})
    accelerator = Accelerator(cpu=True)
    return TrainingLoop(
        model or method(), batches or Batches(), to_inputs, options, accelerator, out, config or options.deciding()
    )


def assert_same_weights(one, other):
    for (name, first), second in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path):
    straight = loop(tmp_path / "straight").run()
    loop(tmp_path / "cut").run()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000006")  # as if killed after step 4
    torch.manual_seed(99)  # the state of the generators must come from the checkpoint
    resumed = loop(tmp_path / "cut")
    assert resumed.step == 4
    assert_same_weights(resumed.run(), straight)
    assert [record["step"] for record in read_log(tmp_path / "cut" / "log.jsonl")] == list(range(6))


def test_a_finished_run_is_not_trained_again(tmp_path):
    finished = loop(tmp_path).run()
    batches = Batches()
    assert_same_weights(loop(tmp_path, batches).run(), finished)
    assert batches.place == 6


def test_a_student_learns_to_say_what_a_fixed_teacher_says(tmp_path):
    class Same(Batches):
        def __iter__(self):
            while True:
                self.place = 0
                yield next(super().__iter__())

    model = method(teacher_momentum=1.0, center_momentum=1.0, patch_center_momentum=1.0, drop_path_rate=0.0)
    loop(tmp_path, Same(), model, steps=200, learning_rate=0.2, checkpoint_every=300, panel_every=1).run()
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

    one = loop(tmp_path / "one", Batches(8), method(drop_path_rate=0.0), batch_size=8).run()
    two = loop(tmp_path / "two", Halves(8), method(drop_path_rate=0.0), accumulation=2).run()
    for (name, first), second in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, atol=2e-4, rtol=2e-3, msg=name)
    assert one.center.value.abs().max() > 0
    torch.testing.assert_close(one.center.value, two.center.value, atol=1e-5, rtol=1e-3)


def test_a_loss_that_is_not_finite_moves_nothing_and_names_its_tiles(tmp_path):
    model = method()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loop(tmp_path, Batches(broken=[0]), model, steps=1, checkpoint_every=10).run()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    (names,) = (tmp_path / "non_finite").iterdir()
    assert json.loads(names.read_text())[0] == {"slide": ["a.svs"] * 4, "xy": [[0, 0]] * 4}


def test_a_run_stops_after_too_many_losses_in_a_row_that_are_not_finite(tmp_path):
    loop(tmp_path / "few", Batches(broken=[1, 2, 4]), max_non_finite=3).run()
    with pytest.raises(UserError, match="not finite 3 steps in a row, last at step 3"):
        loop(tmp_path / "many", Batches(broken=[1, 2, 3]), max_non_finite=3).run()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run_and_the_same_command_goes_on(tmp_path, number):
    straight = loop(tmp_path / "straight").run()

    def interrupt(place):
        if place == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="stopped after step 3") as stopped:
        loop(tmp_path / "cut", Batches(on_batch=interrupt)).run()
    assert stopped.value.signal == number
    assert_same_weights(loop(tmp_path / "cut").run(), straight)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path):
    straight = loop(tmp_path).run()
    with open(tmp_path / "checkpoints" / "step_00000006" / "model.safetensors", "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"\x00" * 10)
    with pytest.warns(UserWarning, match="step_00000006 is damaged"):
        resumed = loop(tmp_path)
    assert resumed.step == 4
    assert_same_weights(resumed.run(), straight)


def test_a_run_with_other_options_is_refused(tmp_path):
    loop(tmp_path).run()
    with pytest.raises(UserError, match="learning_rate 0.05 -> 0.01"):
        loop(tmp_path, learning_rate=0.01)


def test_only_the_last_checkpoints_stay(tmp_path):
    loop(tmp_path, keep_checkpoints=2).run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]


def test_the_log_tells_schedules_losses_and_the_collapse_panel(tmp_path):
    loop(tmp_path).run()
    records = read_log(tmp_path / "log.jsonl")
    assert records[0]["learning_rate"] == 0.0 and records[1]["learning_rate"] == pytest.approx(0.05 * 4 / 256)
    for name in ("loss", "cls_loss", "patch_loss", "weight_decay", "teacher_momentum", "gradient_norm", "seconds"):
        assert all(name in record for record in records), name
    assert [("teacher_entropy" in record) for record in records] == [True, False, False] * 2
