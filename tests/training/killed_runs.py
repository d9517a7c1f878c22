"""Kills one run again and again, at random moments, until it is done: python killed_runs.py FOLDER SEED

Prints how many processes were killed. Processes are forked from this one, which has imported everything, so that many die
in a minute.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from small_runs import Batches, method, small_loop


RUN = {"steps": 60, "checkpoint_every": 1, "keep_checkpoints": 2, "learning_rate": 1e-3, "batch_scaling": "none"}


def train(folder: Path) -> None:
    """Trains to the end, or goes on; a little slow, so that there is something to kill."""
    small_loop(folder, Batches(on_batch=lambda place: time.sleep(0.01)), method(), **RUN).run()


def start(folder: Path) -> int:
    """The process id of a child that trains."""
    child = os.fork()
    if child:
        return child
    try:
        train(folder)
    finally:
        os._exit(0 if sys.exc_info()[0] is None else 1)


def main(folder: Path, seed: int) -> None:
    moments = random.Random(seed)
    killed = 0
    while True:
        child = start(folder)
        deadline = time.monotonic() + moments.uniform(0.05, 0.6)
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                if status:
                    raise SystemExit(f"a run failed after {killed} kills")
                print(killed)
                return
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
