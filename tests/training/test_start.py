"""How recipes start and end: what is refused, what is seeded, and that a process ends whatever goes wrong."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from hf_pathology.errors import UserError
from hf_pathology.training.interrupt import Interrupted
from hf_pathology.training.start import keep_freed_memory, run_recipe, start


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_fp16_is_refused_with_what_to_choose_instead(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as `accelerate launch --mixed_precision fp16` sets it
    with pytest.raises(UserError, match="fp16 is refused: .* choose bf16 or no"):
        start(cpu=True, seed=0)


def test_deepspeed_is_refused_with_what_to_choose_instead(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed is refused: .* half precision.*ddp.yaml"):
        start(cpu=True, seed=0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_is_freed_is_taken_again_without_new_pages():
    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(2**24)  # 64 MB, 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    new_pages()
    assert new_pages() < 16_384


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_other_precisions_are_taken_as_they_are_asked_for_and_the_generators_seeded(monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    assert start(cpu=True, seed=3).mixed_precision == precision
    drawn = torch.rand(1)
    AcceleratorState._reset_state(True)
    start(cpu=True, seed=3)
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no such slide"), 1, "error: no such slide\n"),
        (Interrupted(15, "stopped after step 3"), 143, "stopped after step 3\n"),
        (FileNotFoundError(2, "No such file or directory", "x.svs"), 1, "error: No such file or directory: x.svs\n"),
        (
            UserError(
                "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  x\nhf.errors.UserError: bad\n"
            ),
            1,
            "error: bad\n",
        ),
    ],
)
def test_a_mistake_ends_in_one_line_and_an_honest_exit_code(capsys, error, code, said):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        run_recipe(main)
    assert ended.value.code == code and capsys.readouterr().err == said


def test_a_mistake_in_the_code_is_no_mistake_of_the_user():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_recipe(main)


RECIPE = """
import signal, sys, torch
from torch.utils.data import DataLoader, IterableDataset
from hf_pathology.errors import UserError
from hf_pathology.training.start import run_recipe

def deaf(worker):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

class Stream(IterableDataset):
    def __iter__(self):
        for index in range(10**9):
            if index == 5 and sys.argv[1] == "worker":
                raise UserError("no such tile")
            yield index

def batches():
    yield from DataLoader(Stream(), 1, num_workers=1, worker_init_fn=deaf)

def main(argv):
    for index, batch in enumerate(batches()):
        if index == 3 and sys.argv[1] == "main":
            raise RuntimeError("no such kernel")

run_recipe(main)
"""


def test_a_process_with_workers_that_heed_no_signal_ends_when_something_fails(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    words = [sys.executable, str(tmp_path / "recipe.py")]
    running = {where: subprocess.Popen([*words, where], **pipes) for where in ("worker", "main")}
    said = {where: process.communicate(timeout=100)[1] for where, process in running.items()}
    assert {where: process.returncode for where, process in running.items()} == {"worker": 1, "main": 1}
    assert said["worker"] == "error: no such tile\n"
    assert said["main"].endswith("RuntimeError: no such kernel\n")
