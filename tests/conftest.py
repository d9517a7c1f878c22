"""One torch thread per test process, and the folders of the reference data when they lie beside the checkout."""

from pathlib import Path

import pytest
import torch


torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of golden tensors computed by the original codes; skips where it is absent."""
    folder = SHARED / "goldens"
    if not folder.is_dir():
        pytest.skip("needs the golden tensors beside the checkout")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real slides and tiles; skips where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("needs the real slides and tiles beside the checkout")
    return folder
