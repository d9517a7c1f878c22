"""What a run writes down: the log's numbers, its clocks, and the trackers."""

import json
import shutil
import sqlite3
import time

import pytest
import torch
from small_runs import Batches, method, small_loop

from hf_pathology.errors import UserError
from hf_pathology.training.log import read_log
from hf_pathology.training.spent import Spent


def test_the_log_tells_schedules_losses_and_the_collapse_panel(tmp_path):
    small_loop(tmp_path).run()
    records = read_log(tmp_path / "log.jsonl")
    assert records[0]["learning_rate"] == 0.0 and records[1]["learning_rate"] == pytest.approx(0.05 * 4 / 256)
    for name in ("loss", "cls_loss", "patch_loss", "weight_decay", "teacher_momentum", "gradient_norm", "seconds"):
        assert all(name in record for record in records), name
    assert [("teacher_entropy" in record) for record in records] == [True, False, False] * 2


def test_the_log_tells_what_the_run_has_seen_and_spent(tmp_path):
    small_loop(tmp_path, accumulation=2).run()
    records = read_log(tmp_path / "log.jsonl")
    assert [record["images"] for record in records] == [8, 16, 24, 32, 40, 48]
    for record in records:
        assert record["images_per_second"] == pytest.approx(8 / record["seconds"])
        assert 0 <= record["waited_seconds"] < record["seconds"]
    spent = [record["cpu_seconds"] for record in records]
    assert spent == sorted(spent) and spent[0] > 0


def test_cpu_seconds_go_on_where_the_checkpoint_left_them(tmp_path):
    class Busy(Batches):
        """Each batch costs CPU time."""

        def views(self, generator, count, size):
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
            return super().views(generator, count, size)

    small_loop(tmp_path, Busy()).run()
    before = [record["cpu_seconds"] for record in read_log(tmp_path / "log.jsonl")]
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000006")
    small_loop(tmp_path, Busy()).run()
    after = [record["cpu_seconds"] for record in read_log(tmp_path / "log.jsonl")]
    assert before[:4] == after[:4]
    assert after[4] - after[3] >= 0.1 and after == sorted(after)
    assert after[-1] > 0.6


def test_the_cpu_seconds_of_living_workers_count():
    spent = Spent()
    stream = torch.utils.data.DataLoader(BusyStream(), batch_size=None, num_workers=1)
    batches = iter(stream)
    seconds = float(next(batches))
    alive = spent.cpu_seconds
    del batches
    assert seconds >= 0.5 and alive >= 0.45
    assert spent.cpu_seconds >= alive - 0.05  # the same ones, now of a finished child


class BusyStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        until = time.process_time() + 0.5
        while time.process_time() < until:
            pass
        yield torch.tensor(0.5)
        while True:
            yield torch.tensor(0.0)


def test_what_the_run_did_before_the_loop_is_not_counted():
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert Spent().cpu_seconds < 0.1
    assert Spent(7.0).cpu_seconds == pytest.approx(7.0, abs=0.1)


def test_the_panel_comes_at_its_steps_whether_or_not_a_record_is_due(tmp_path):
    small_loop(tmp_path, log_every=4, panel_every=3).run()
    records = read_log(tmp_path / "log.jsonl")
    assert [(record["step"], "effective_rank" in record) for record in records] == [(0, True), (3, True), (4, False)]


def test_tensorboard_has_the_losses_of_the_log_once_each_after_a_resume_too(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small_loop(tmp_path, trackers=["tensorboard"]).run()
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000006")
    small_loop(tmp_path, trackers=["tensorboard"]).run()
    events = EventAccumulator(str(tmp_path / "trackers" / tmp_path.name))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    expected = {record["step"]: record["loss"] for record in read_log(tmp_path / "log.jsonl")}
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(events.Scalars("loss")) == 6
    assert events.Scalars("teacher_entropy")[0].step == 0


def test_trackio_has_the_losses_of_the_log_in_a_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    loop = small_loop(tmp_path / "run", trackers=["trackio"])
    loop.run()
    loop.accelerator.end_training()
    (run,) = trackio.Api().runs("run")
    assert run.config["learning_rate"] == 0.05
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics").fetchall()
    found = {step: json.loads(metrics)["loss"] for step, metrics in rows}
    assert found == {record["step"]: record["loss"] for record in read_log(tmp_path / "run" / "log.jsonl")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "trackers: nothing is not known; known are .*tensorboard"),
        ("aim", "aim is not installed; run: pip install aim"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_with_what_to_install(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        small_loop(tmp_path, trackers=[name])


def test_a_tracker_of_the_extra_is_refused_with_the_name_of_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_pathology.training.trackers.get_available_trackers", list)
    with pytest.raises(UserError, match=r"tensorboard is not installed; run: pip install 'hf_pathology\[trackers\]'"):
        small_loop(tmp_path, trackers=["tensorboard"])


def test_an_alarm_is_a_word_in_the_log(tmp_path, capsys):
    small_loop(tmp_path, learning_rate=0.3, model=method()).run()
    alarms = [record.get("alarm", "") for record in read_log(tmp_path / "log.jsonl")]
    assert "learning rate" in "".join(alarms) and capsys.readouterr().err.count("alarm at step") == 1
