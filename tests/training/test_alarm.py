"""The alarm in words: what it says of which numbers, and of runs that really collapse."""

import pytest
import torch
from small_runs import Batches, method, small_loop

from hf_pathology.training.alarm import Alarm
from hf_pathology.training.log import read_log


HEALTHY = {
    "learning_rate": 1e-3,
    "teacher_entropy": 5.7,
    "uniform_entropy": 6.93,
    "kl": 0.5,
    "prototype_usage": 0.16,
    "feature_std": 0.48,
    "effective_rank": 5.5,
}


def said(records, optimizer="adamw") -> list[str]:
    alarm = Alarm(optimizer)
    return [alarm.look(record) for record in records]


@pytest.mark.parametrize(
    ("kind", "sign"),
    [
        ("uniform collapse", {"teacher_entropy": 6.929, "kl": 0.001}),
        ("one-hot collapse", {"teacher_entropy": 0.25, "prototype_usage": 0.031}),
        ("equal features", {"feature_std": 0.004}),
        ("one dimension", {"effective_rank": 1.4}),
    ],
)
def test_a_sign_of_collapse_is_told_at_the_third_panel_in_a_row_and_once(kind, sign):
    ill = {**HEALTHY, **sign}
    assert said([ill, ill, HEALTHY] * 3) == [""] * 9
    texts = said([ill] * 6)
    assert texts[2].startswith(f"{kind}: ") and "what to do" in texts[2]
    assert texts[:2] == [""] * 2 and texts[3:] == [""] * 3


def test_records_without_a_panel_do_not_interrupt_a_row_of_panels():
    ill = {**HEALTHY, "effective_rank": 1.0}
    plain = {"learning_rate": 1e-3, "loss": 3.0}
    assert "one dimension" in said([ill, plain, ill, plain, ill])[-1]


@pytest.mark.parametrize(
    "record",
    [
        HEALTHY,
        # As measured at step 54 of a DINO of 16,384 prototypes: young, and in good order.
        {**HEALTHY, "teacher_entropy": 9.628, "uniform_entropy": 9.704, "kl": 0.046, "feature_std": 0.24},
        {**HEALTHY, "teacher_entropy": 6.931, "kl": 0.6},  # the teacher is vague, the student is not yet
        {**HEALTHY, "teacher_entropy": 0.3, "prototype_usage": 0.9},  # sure of itself, and of each tile something else
        {"loss": 1.0},
    ],
)
def test_a_run_in_good_order_raises_no_alarm(record):
    assert said([record] * 10) == [""] * 10


def test_a_high_learning_rate_is_told_at_once_of_adamw_only():
    high = {**HEALTHY, "learning_rate": 2.1e-3}
    assert "0.0021 is above 0.002" in said([high])[0]
    assert said([high], "sgd") == said([high], "lars") == said([{**high, "learning_rate": 2e-3}]) == [""]


def test_a_high_learning_rate_is_no_alarm_with_the_large_steps_of_the_published_sets():
    high = {**HEALTHY, "learning_rate": 3e-3, "step": 9}
    assert said([{**high, "images": 10_240}]) == [""]
    assert "with steps of only 1023 tiles" in said([{**high, "images": 10_230}])[0]


class Colours(Batches):
    """Tiles of one colour each, their views a little lighter or darker: something to learn, that is soon learnt."""

    def views(self, generator, count, size):
        colour = torch.randn(self.batch_size, 3, 1, 1, generator=self.tile)
        noise = torch.randn(count, self.batch_size, 3, size, size, generator=generator)
        return colour + 0.3 * noise


RUN = {"steps": 120, "batch_size": 16, "learning_rate": 2e-3, "batch_scaling": "none", "panel_every": 10}
SHARP = {"teacher_temperature": 0.04, "teacher_patch_temperature": 0.04}
HOT = dict.fromkeys((*SHARP, "warmup_teacher_temperature", "warmup_teacher_patch_temperature"), 5.0)
UNCENTRED = {"center_momentum": 1.0, "patch_center_momentum": 1.0}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [(SHARP, None), ({**SHARP, **UNCENTRED}, "one-hot collapse"), (HOT, "uniform collapse")],
    ids=["healthy", "not centred", "hot teacher"],
)
def test_runs_that_really_collapse_raise_the_alarm_and_a_healthy_one_does_not(tmp_path, capsys, changes, kind):
    small_loop(tmp_path, Colours(16), method(**changes), checkpoint_every=1000, **RUN).run()
    alarms = [record["alarm"] for record in read_log(tmp_path / "log.jsonl") if "alarm" in record]
    error = capsys.readouterr().err
    if kind is None:
        assert not alarms and "alarm" not in error
    else:
        assert len(alarms) == 1 and alarms[0].startswith(kind)
        assert error.count("alarm at step") == 1 and alarms[0] in error
