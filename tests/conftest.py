"""One torch thread per test process, and the folders of the reference data when they lie beside the checkout."""

from pathlib import Path

import pytest
import torch
from originals import FIXTURES, Case, read_case


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


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """The case that `originals.cases` names: from `tests/fixtures`, or from the golden tensors where they lie."""
    source, name = request.param
    folder = FIXTURES if source == "fixtures" else request.getfixturevalue("goldens")
    return read_case(folder / f"{name}.safetensors")
