"""The wheel in a clean environment, away from the checkout: what a user of `pip install` gets."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
UV = Path(sys.executable).parent / "uv"


def run(*words, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    finished = subprocess.run(
        [str(word) for word in words],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the tracked files so that nothing lying about gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = run("git", "ls-files", "-z", cwd=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--installer", "uv", "--outdir", folder, source, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_all_data_files_and_one_top_level_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"hf_pathology"}
    for needed in (
        "recipes/configs/ibot_demo.yaml",
        "recipes/configs/ibot_vit_small.yaml",
        "recipes/accelerate/cpu.yaml",
        "recipes/notebooks/lora_finetuning.ipynb",
        "model_cards/encoder.md.j2",
        "report/page.html.j2",
        "evaluation/metrics/classification/classification.py",
    ):
        assert f"hf_pathology/{needed}" in names


@pytest.mark.skipif(not UV.is_file(), reason="needs the uv that the Makefile installs")
def test_a_clean_environment_tells_the_whole_story(wheel, tmp_path):
    python = tmp_path / "env" / "bin" / "python"
    run(UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "env", cwd=tmp_path)
    run(UV, "pip", "install", "--quiet", "--python", python, wheel, cwd=tmp_path, timeout=900)
    program = tmp_path / "env" / "bin" / "hf-pathology"

    where = run(python, "-c", "import hf_pathology; print(hf_pathology.__file__)", cwd=tmp_path).stdout
    assert str(tmp_path) in where
    assert "train-mil" in run(program, "--help", cwd=tmp_path).stdout

    run(program, "demo", "--tiny", "--out", "demo", cwd=tmp_path)
    assert (tmp_path / "demo" / "report.html").stat().st_size > 100_000
    load = (
        "import hf_pathology; from transformers import AutoModel; print(type(AutoModel.from_pretrained({})).__name__)"
    )
    assert "ViTModel" in run(python, "-c", load.format("'demo/pretrain/encoder'"), cwd=tmp_path).stdout
    assert "Abmil" in run(python, "-c", load.format("'demo/mil/head'"), cwd=tmp_path).stdout
    run(
        python,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "-m",
        "hf_pathology.recipes.pretrain_ibot",
        "--help",
        cwd=tmp_path,
    )
