"""The directions of import, the list of packages, and what a light import must not load."""

import ast
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
LEFT = ("slides", "tiles", "features", "evaluation", "report")
SMALL = {"atomic", "claims", "errors", "progress", "record", "version"}  # modules that every part may use

# What each part may import of ours, beside itself and the small modules.
MAY_IMPORT = {
    "slides": set(),
    "tiles": {"slides"},
    "features": {"slides", "tiles"},
    "evaluation": {"features"},
    "report": {"slides", "tiles", "features", "evaluation"},
    "training": set(),
    "modeling": set(),
}


def folder_of(part: str) -> Path:
    return ROOT / part if part == "modeling" else ROOT / "hf_pathology" / part


def imports(file: Path) -> list[str]:
    """The full names of all modules that `file` imports, wherever the statement stands."""
    package = ["hf_pathology", *file.relative_to(ROOT).with_suffix("").parts]
    if package[1] == "hf_pathology":
        package = package[1:]
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names += [stem] if node.module else [f"{stem}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_in_the_directions_of_the_design(part):
    allowed = MAY_IMPORT[part] | {part} | (SMALL if part != "modeling" else set())
    for file in folder_of(part).rglob("*.py"):
        ours = {name.split(".")[1] for name in imports(file) if name.startswith("hf_pathology.")}
        assert ours <= allowed, f"{file.relative_to(ROOT)} imports {sorted(ours - allowed)}"


def test_our_parts_are_imported_by_their_installed_names():
    for folder in ("hf_pathology", "modeling", "recipes", "hub_upload", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            bare = {name.split(".")[0] for name in imports(file)} & {
                "modeling",
                "recipes",
                "hub_upload",
                "model_cards",
            }
            assert not bare, (
                f"{file.relative_to(ROOT)} imports {bare}, which only the checkout's root has by that name"
            )


def test_the_slide_pillar_has_no_torch():
    for file in folder_of("slides").rglob("*.py"):
        heavy = {name.split(".")[0] for name in imports(file)} & {"torch", "transformers", "datasets"}
        assert not heavy, f"{file.relative_to(ROOT)} imports {heavy}"


def test_modeling_files_import_only_torch_transformers_and_siblings():
    for file in folder_of("modeling").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, file.name
        roots = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names)
        assert roots <= {"torch", "transformers", "hf_pathology"}, f"{file.name} imports {roots}"
    assert not [path for path in folder_of("modeling").iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_every_folder_with_code_is_listed_as_a_package():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {"hf_pathology"}
    for top in ("hf_pathology", "modeling", "recipes", "model_cards", "hub_upload"):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "hf_pathology" else ("hf_pathology", *parts)))
    assert listed == found


@pytest.mark.parametrize("module", ["hf_pathology", "hf_pathology.cli"])
def test_a_light_import_loads_neither_torch_nor_transformers(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_the_types_that_are_registered_when_asked_for_are_all_types_of_ours():
    from hf_pathology import modeling
    from hf_pathology.registration import OUR_TYPES

    configs = [getattr(modeling, name) for name in modeling.__all__ if name.endswith("Config")]
    assert {config.model_type for config in configs} == OUR_TYPES


@pytest.mark.parametrize("first", ["import transformers", "from transformers import AutoModel, ViTModel", "pass"])
def test_importing_the_package_is_all_that_the_auto_classes_need(first):
    code = f"{first}\nimport hf_pathology\nfrom transformers import AutoConfig, AutoModel, ViTModel\n"
    code += "model = AutoModel.from_config(AutoConfig.for_model('abmil', input_dim=4))\nprint(type(model).__name__)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "AbmilForSlideClassification"
