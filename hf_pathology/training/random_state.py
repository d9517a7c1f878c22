"""The random generators of a process: seeded for a rank and a step, restored from a checkpoint, left undisturbed."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import load, set_seed


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Seeds Python, NumPy and torch from all three numbers, so that no two ranks and no two starts draw the same."""
    set_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def restore_random_state(file: Path, device: torch.device) -> None:
    """Restores the generators of this process from the `file` that accelerate has written.

    accelerate's own loading passes over errors in silence. Raises KeyError or IndexError when a generator is not there.
    """
    states = load(file)
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["torch_cuda_manual_seed"][device.index or 0], device)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leaves all generators as they were before the block, whatever it draws."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
