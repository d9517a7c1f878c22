"""The log of a run as JSON lines."""

import json
import math

import pytest

from hf_pathology.training.log import JsonLog, read_log


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "log.jsonl"


def test_records_come_back_in_the_order_they_were_written(path):
    log = JsonLog(path, first_step=0)
    records = [{"step": step, "loss": 1 / (1 + step)} for step in range(3)]
    for record in records:
        log.write(record)
    assert read_log(path) == records


def test_there_are_no_records_without_a_file(path):
    assert read_log(path) == []


def test_a_resumed_log_drops_the_steps_that_will_be_made_again(path):
    log = JsonLog(path, first_step=0)
    for step in range(5):
        log.write({"step": step})
    JsonLog(path, first_step=3).write({"step": 3, "again": True})
    assert read_log(path) == [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_last_line_cut_short_is_left_out_and_does_not_spoil_the_next_record(path):
    JsonLog(path, first_step=0).write({"step": 0})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 1, "lo')
    assert read_log(path) == [{"step": 0}]
    JsonLog(path, first_step=1).write({"step": 1})
    assert read_log(path) == [{"step": 0}, {"step": 1}]


def test_a_new_run_starts_with_an_empty_log(path):
    JsonLog(path, first_step=0).write({"step": 7})
    JsonLog(path, first_step=0)
    assert read_log(path) == []


def test_words_stay_words_and_what_is_not_finite_becomes_null(path):
    JsonLog(path, first_step=0).write(
        {"step": 0, "alarm": "collapse: all the same", "loss": float("inf"), "done": True}
    )
    assert json.loads(path.read_text()) == {"step": 0, "alarm": "collapse: all the same", "loss": None, "done": True}
    (record,) = read_log(path)
    assert record["alarm"] == "collapse: all the same" and math.isnan(record["loss"])
