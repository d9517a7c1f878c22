"""What the files that travel with a release have to be like, for every transformers that is to load them."""

from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import hf_pathology.modeling


MODELING = Path(hf_pathology.modeling.__file__).parent
KINDS = (
    "abmil",
    "deep_attn_misl",
    "deep_graph_conv",
    "dsmil",
    "hipt",
    "hipt_slide",
)  # whose releases bring their code


@pytest.mark.parametrize("file", [f"{part}_{kind}.py" for kind in KINDS for part in ("configuration", "modeling")])
def test_a_file_that_a_release_names_names_all_files_that_it_needs(file):
    """transformers 5.9 copies these from a local folder, and not what they in turn import."""
    needed = {Path(path).stem for path in get_relative_import_files(MODELING / file)}
    assert needed == set(get_relative_imports(MODELING / file))
