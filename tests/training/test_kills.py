"""Whatever the moment a run is killed at, what it leaves can be gone on from, to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from killed_runs import RUN, train
from safetensors.torch import load_file

from hf_pathology.training.log import read_log


SCRIPT = Path(__file__).with_name("killed_runs.py")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_that_was_not(tmp_path):
    train(tmp_path / "straight")
    kills, seed = 0, 0
    while kills < 60:
        folder = tmp_path / f"killed {seed}"
        paths = [str(SCRIPT.parent), str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, str(SCRIPT), str(folder), str(seed)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        kills, seed = kills + int(done.stdout), seed + 1
        last = f"checkpoints/step_{RUN['steps']:08d}/model.safetensors"
        expected, found = load_file(tmp_path / "straight" / last), load_file(folder / last)
        assert all((expected[name] == found[name]).all() for name in expected) and expected.keys() == found.keys()
        logs = [read_log(run / "log.jsonl") for run in (tmp_path / "straight", folder)]
        losses = [{record["step"]: record["loss"] for record in log} for log in logs]
        assert losses[0] == losses[1] and len(losses[0]) == len(logs[1]) == RUN["steps"]
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000059", "step_00000060"]
