"""The encoder on the way: exported and judged at its times, without a trace in the training."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import assert_same_weights, small_loop

from hf_pathology.training.log import read_log


def judge_that_draws(seen):
    """A judge that draws from every generator and notes how the encoder was given to it."""

    def judge(encoder):
        features = encoder(torch.randn(2, 3, 32, 32)).last_hidden_state
        seen.append((encoder.training, features.requires_grad, encoder.layernorm.weight.clone()))
        return {"knn": random.random() + np.random.rand(), "probe": torch.tensor(0.5)}

    return judge


def test_a_judged_run_has_the_same_bits_as_one_that_is_not(tmp_path):
    plain = small_loop(tmp_path / "plain").run()
    judged = small_loop(
        tmp_path / "judged", hooks={"judge": judge_that_draws([])}, judge_every=1, mixed_precision="no"
    ).run()
    assert_same_weights(judged, plain)
    assert judged.training and not judged.teacher.training


def test_the_encoder_is_judged_every_so_often_and_at_the_end_and_the_log_says_so(tmp_path):
    seen = []
    trained = small_loop(
        tmp_path, hooks={"judge": judge_that_draws(seen)}, judge_every=3, steps=7, log_every=2, panel_every=100
    ).run()
    records = read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in records] == [0, 2, 4, 5, 6]  # every second, and where the encoder is judged
    assert [record["step"] for record in records if "knn" in record] == [2, 5, 6]
    assert all(record["probe"] == 0.5 and record["loss"] > 0 for record in records if "knn" in record)
    assert [(training, gradient) for training, gradient, _ in seen] == [(False, False)] * 3
    assert torch.equal(seen[-1][2], trained.encoder.layernorm.weight)  # after the last step
    assert not torch.equal(seen[0][2], seen[1][2])


@pytest.mark.parametrize("options", [{}, {"judge_every": 0, "export_every": 0}])
def test_nothing_is_judged_or_exported_unless_it_is_asked_for(tmp_path, options):
    def never(*_):
        raise AssertionError

    small_loop(tmp_path, hooks={"judge": never, "export": never}, **options).run()


def test_the_encoder_is_exported_every_so_often(tmp_path):
    def export(path):
        torch.rand(1)
        loop.method.encoder.save_pretrained(path)

    plain = small_loop(tmp_path / "plain").run()
    loop = small_loop(tmp_path / "run", hooks={"export": export}, export_every=4)
    assert_same_weights(loop.run(), plain)
    folders = sorted((tmp_path / "run" / "encoders").iterdir())
    assert [folder.name for folder in folders] == ["step_00000004", "step_00000006"]
    assert torch.equal(
        load_file(folders[-1] / "model.safetensors")["layernorm.weight"], plain.teacher.layernorm.weight
    )


def test_what_a_judge_computes_is_not_counted_as_training(tmp_path):
    def judge(encoder):
        values = torch.randn(400, 400)
        for _ in range(200):
            values = values @ values / 20
        return {"idle": 0.0}

    small_loop(tmp_path / "run", hooks={"judge": judge}, judge_every=1, steps=3).run()
    small_loop(tmp_path / "plain", steps=3).run()
    judged, plain = (read_log(tmp_path / name / "log.jsonl")[-1] for name in ("run", "plain"))
    assert judged["seconds"] > 0.1  # it did take its time
    assert judged["cpu_seconds"] < plain["cpu_seconds"] + 0.2
