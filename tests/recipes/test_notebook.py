"""The LoRA notebook runs from top to bottom on the toys that it makes itself."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoModel, AutoModelForImageClassification

import hf_pathology.recipes


NOTEBOOK = Path(hf_pathology.recipes.__file__).parent / "notebooks" / "lora_finetuning.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_stored_without_outputs(notebook):
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


def test_the_first_code_cell_installs_only_where_the_package_is_missing(notebook):
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert 'find_spec("hf_pathology") is None' in first.source
    assert "%pip install" in first.source


def test_one_cell_holds_the_parameters_and_leaves_the_paths_to_the_user(notebook):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters = {}
    exec(cell.source, parameters)
    assert parameters["ENCODER"] == parameters["TILES"] == ""


def test_the_notebook_trains_merges_and_reloads_on_its_toys(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    done = client.execute()
    outputs = {cell.id: cell.outputs for cell in done.cells if cell.cell_type == "code"}
    printed = "".join(output.get("text", "") for output in outputs["train"])
    assert "epoch 10 of 10" in printed
    table = outputs["scores"][0]["data"]["text/plain"]
    assert all(way in table for way in ("colour", "frozen encoder", "LoRA", "balanced_accuracy"))
    for auto_class, name in ((AutoModel, "merged"), (AutoModelForImageClassification, "classifier")):
        _, loading = auto_class.from_pretrained(tmp_path / "lora_out" / name, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
