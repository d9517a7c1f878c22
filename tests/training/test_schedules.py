"""Schedules against the arrays of the original code, and at their ends."""

import pytest
from originals import cases

from hf_pathology.training.schedules import cosine_with_warmup, scaled_rate


@pytest.mark.parametrize("name", ["lr", "wd", "mom", "lr0", "lrw"])
@pytest.mark.parametrize("case", cases("04_dino_schedules"), indirect=True)
def test_the_cosine_equals_that_of_dino_at_every_step(case, name):
    base, final, epochs, steps_an_epoch, options = case.meta["cosine_scheduler_args"][name]
    expected = case.output[f"schedule_{name}"].tolist()
    assert len(expected) == epochs * steps_an_epoch
    ours = [
        cosine_with_warmup(
            step,
            len(expected),
            base=base,
            final=final,
            warmup_steps=options.get("warmup_epochs", 0) * steps_an_epoch,
            start=options.get("start_warmup_value", 0.0),
        )
        for step in range(len(expected))
    ]
    assert ours == pytest.approx(expected, abs=1e-12, rel=0)


def test_the_warm_up_reaches_the_base_at_its_last_step_and_the_cosine_starts_there():
    rates = [cosine_with_warmup(step, 20, base=0.5, final=0.1, warmup_steps=5, start=0.1) for step in range(20)]
    assert rates[0] == 0.1
    assert rates[4] == rates[5] == 0.5
    assert 0.1 < rates[-1] < 0.11


def test_a_warm_up_of_one_step_and_one_of_all_steps_are_finite():
    assert cosine_with_warmup(0, 10, base=1.0, final=0.0, warmup_steps=1) == 0.0
    assert cosine_with_warmup(1, 10, base=1.0, final=0.0, warmup_steps=1) == 1.0
    assert cosine_with_warmup(9, 10, base=1.0, final=0.0, warmup_steps=10) == 1.0


@pytest.mark.parametrize("case", cases("06_mae_extras"), indirect=True)
def test_the_rate_equals_that_of_mae_at_every_fractional_epoch(case):
    arguments = case.meta["lr_args"]
    epochs = case.input["epoch_fraction"].tolist()
    steps_an_epoch = round(1 / (epochs[1] - epochs[0]))
    assert epochs == pytest.approx([step / steps_an_epoch for step in range(len(epochs))], abs=1e-12)
    ours = [
        cosine_with_warmup(
            step,
            arguments["epochs"] * steps_an_epoch,
            base=arguments["lr"],
            final=arguments["min_lr"],
            warmup_steps=arguments["warmup_epochs"] * steps_an_epoch,
            includes_end=False,
        )
        for step in range(len(epochs))
    ]
    assert ours == pytest.approx(case.output["lr"].tolist(), abs=1e-15, rel=1e-12)


def test_a_warm_up_without_its_end_reaches_the_base_at_the_step_after_it():
    rates = [
        cosine_with_warmup(step, 20, base=0.5, final=0.0, warmup_steps=5, includes_end=False) for step in range(7)
    ]
    assert rates[:6] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[6] < 0.5


def test_the_rate_follows_the_batch_as_each_recipe_has_it():
    assert scaled_rate(5e-4, 1024, 256, "linear") == pytest.approx(2e-3)  # DINO, iBOT, MAE
    assert scaled_rate(4e-3, 256, 1024, "sqrt") == pytest.approx(2e-3)  # DINOv2
    assert scaled_rate(4e-3, 256, 1024, "none") == 4e-3
