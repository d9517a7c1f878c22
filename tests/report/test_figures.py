import math

import numpy as np
import pytest

from hf_pathology.evaluation.intervals import auc_difference
from hf_pathology.report.comparison import auc_figure, comparison_table, roc_figure
from hf_pathology.report.figures import collapse_figure, loss_figure, schedule_figure, speed_figure, throughput
from hf_pathology.report.images import jpeg_uri, pixels_of, shrunk, svg_uri
from hf_pathology.report.sections import pretraining_section


PANEL = {
    "teacher_entropy": 3.0,
    "uniform_entropy": 6.9,
    "feature_std": 0.6,
    "effective_rank": 11.0,
    "view_agreement": 0.5,
}


def record(step, loss=9.0, **more):
    schedules = {"learning_rate": 1e-4, "weight_decay": 0.04, "teacher_momentum": 0.99, "teacher_temperature": 0.04}
    losses = {"loss": loss, "cls_loss": loss / 2, "patch_loss": loss / 2, "teacher_patch_temperature": 0.04}
    return {"step": step, "images": 48 * step, "seconds": 4.0, "waited_seconds": 0.5} | schedules | losses | more


LOGS = {
    "usual": [record(step, **(PANEL if step % 20 == 0 else {})) for step in range(0, 100, 5)],
    "without panels": [record(0), record(5)],
    "single record": [record(0, **PANEL)],
    "a loss that is no number": [record(0), record(5, math.nan), record(10, math.inf), record(15)],
    "no finite loss": [record(0, math.nan), record(5, math.nan)],
    "another method": [{"step": 0, "images": 0, "loss": 1.0, "learning_rate": 0.1, "feature_std": 0.0}],
}


@pytest.mark.parametrize("records", LOGS.values(), ids=LOGS)
def test_every_log_can_be_drawn(records):
    for draw in (loss_figure, schedule_figure, collapse_figure, speed_figure):
        assert svg_uri(draw(records)).startswith("data:image/svg+xml;base64,")
    section = pretraining_section(records)
    assert f"step {records[-1]['step']}" in section.text and len(section.figures) >= 2


def test_no_log_is_said_to_be_none():
    assert pretraining_section([]).figures == ()


def test_the_same_log_gives_the_same_plot():
    assert svg_uri(loss_figure(LOGS["usual"])) == svg_uri(loss_figure(LOGS["usual"]))


def test_throughput_is_measured_between_records():
    steps, speed, waited = throughput([record(0), record(10), record(30)])
    np.testing.assert_array_equal(steps, [10, 30])
    np.testing.assert_array_equal(speed, [120, 240])
    np.testing.assert_array_equal(waited, [0.125, 0.125])


def test_features_are_compared_in_plots_and_a_table(validation):
    validations = {"ours": validation(2.0), "theirs": validation(0.5, seed=1)}
    ours, theirs = validations.values()
    gain = auc_difference(ours.cases, ours.targets, ours.probabilities, theirs.probabilities, seed=0)
    differences = {"theirs": gain}
    assert pixels_of(roc_figure(validations, 1, seed=0)).shape[2] == 3
    assert pixels_of(auc_figure({name: one.auc for name, one in validations.items()}, differences)).shape[2] == 3
    table = comparison_table(validations, differences)
    assert [row[0] for row in table.rows] == ["ours", "theirs"]
    assert table.rows[0][1] == f"{ours.auc.value:.3f}" and table.rows[0][4] == "–"
    assert table.rows[1][4] == f"{gain.value:+.3f}"
    assert "20 cases in 2 folds" in table.caption


def test_one_set_of_features_and_three_classes_can_be_drawn(validation):
    single = {"ours": validation(1.0, ("a", "b", "c"))}
    assert "c against the rest" in roc_figure(single, 2, seed=0).axes[0].get_title("left")
    assert len(auc_figure({"ours": single["ours"].auc}, {}).axes) == 1


def test_pictures_are_shrunk_and_never_enlarged():
    picture = np.zeros((100, 50, 3), np.uint8)
    assert shrunk(picture, 40).shape == (40, 20, 3) and shrunk(picture, 200) is picture
    assert jpeg_uri(picture).startswith("data:image/jpeg;base64,")
