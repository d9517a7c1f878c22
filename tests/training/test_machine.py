"""What a run notes of where it computes."""

import json
import platform

from accelerate import Accelerator

from hf_pathology.training.machine import machine_of, note_start


def test_each_start_is_noted_and_those_of_steps_made_again_are_forgotten(tmp_path):
    accelerator = Accelerator(cpu=True)
    for first_step in (0, 10, 20, 10):
        note_start(tmp_path, first_step, {"steps": 30}, accelerator)
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["config"] == {"steps": 30}
    assert [start["first_step"] for start in written["starts"]] == [0, 10]


def test_a_machine_is_told_by_its_kind_and_not_by_its_name():
    machine = machine_of(Accelerator(cpu=True))
    assert (machine["device"], machine["processes"], machine["mixed_precision"]) == ("CPU", 1, "no")
    assert {"torch", "transformers", "hf_pathology"} <= set(machine["versions"])
    assert platform.node() not in json.dumps(machine)
