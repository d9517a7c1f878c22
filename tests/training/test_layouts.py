"""The same training on one process and on two, in one batch and in several, whole and sharded (FSDP2)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from small_runs import METHODS, Parts, method, small_loop
from two_processes import SAME

from hf_pathology.errors import UserError
from hf_pathology.training.log import read_log


SCRIPT = Path(__file__).with_name("two_processes.py")
KINDS = ("ddp", "sharded")


def one_process(out, name="ibot", parts=(0,), **changes) -> torch.nn.Module:
    """Trained on whole batches by one process, or on their `parts` as micro-batches of a step."""
    count = len(parts)
    accumulation = {"accumulation": count, "batch_size": 8 // count}
    model = method(name, drop_path_rate=0.0)
    return small_loop(out, Parts(count, parts), model, **{**SAME, **accumulation, **changes}).run()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of all runs of two processes; see `two_processes.py`."""
    folder = tmp_path_factory.mktemp("two")
    one_process(folder / "begun by one", steps=4)
    shutil.rmtree(folder / "begun by one" / "checkpoints" / "step_00000004")  # as if it had been killed before
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(SCRIPT),
        str(folder),
    ]
    paths = [str(SCRIPT.parent), str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=within, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_moved(weights: dict[str, torch.Tensor], name: str) -> None:
    """The method has been trained far beyond the tolerance of these tests."""
    untrained = method(name, drop_path_rate=0.0).state_dict()
    assert max(float((weights[key] - untrained[key]).abs().max()) for key in weights) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one_does_on_all_tiles(two, tmp_path, name, kind):
    expected = one_process(tmp_path, name).state_dict()
    assert_moved(expected, name)
    assert_close(load_file(two / f"{name} {kind}.safetensors"), expected)


@pytest.mark.parametrize("parts", [(0, 1), (0, 1, 2, 3)], ids=["two", "four"])
@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_train_as_one_batch_does(tmp_path, name, parts):
    expected = one_process(tmp_path / "one", name).state_dict()
    assert_close(one_process(tmp_path / "several", name, parts).state_dict(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_micro_batches_train_as_one_does_on_all_tiles(two, tmp_path, kind):
    assert_close(load_file(two / f"accumulated {kind}.safetensors"), one_process(tmp_path).state_dict())


def test_whole_and_sharded_weights_train_alike_and_log_alike(two):
    whole, sharded = (load_file(two / f"ibot {kind}.safetensors") for kind in KINDS)
    assert_close(sharded, whole, within=1e-6)
    logs = [read_log(two / f"ibot {kind}" / "log.jsonl") for kind in KINDS]
    for one, other in zip(*logs, strict=True):
        for number in ("loss", "cls_loss", "gradient_norm", "images", "learning_rate", "effective_rank"):
            assert one.get(number, 0.0) == pytest.approx(other.get(number, 0.0), rel=1e-5), number


def test_whole_and_sharded_weights_train_alike_in_bf16_where_autocast_says_so(two):
    whole, sharded = (load_file(two / f"bf16 {kind}.safetensors") for kind in KINDS)
    assert all(value.dtype == torch.float32 for value in sharded.values() if value.is_floating_point())
    assert_close(sharded, whole, within=1e-6)
    exact = load_file(two / "ibot sharded.safetensors")
    assert max(float((sharded[name] - exact[name]).abs().max()) for name in exact) > 1e-5  # bf16 it was


def test_whole_and_sharded_weights_train_alike_with_adamw_and_dropping(two):
    whole, sharded = (load_file(two / f"straight {kind}.safetensors") for kind in KINDS)
    for name, value in whole.items():
        if not name.endswith("k_proj.bias"):  # on which no output depends: AdamW makes steps of their rounding
            torch.testing.assert_close(sharded[name], value, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_two_processes_that_was_cut_goes_on_to_the_same_bits(two, kind):
    straight, cut = (load_file(two / f"{name} {kind}.safetensors") for name in ("straight", "cut"))
    assert straight.keys() == cut.keys()
    for name, value in straight.items():
        assert torch.equal(value, cut[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_on_one_process_is_refused_by_both(two, kind):
    records = read_log(two / f"broken {kind}" / "log.jsonl")
    assert [record["finite"] for record in records] == [1.0, 0.0, 1.0]
    assert len(list((two / f"broken {kind}" / "non_finite").iterdir())) == 2
    weights = load_file(two / f"broken {kind}.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert_moved(weights, "ibot")


def test_two_processes_go_on_where_one_stopped(two, tmp_path):
    assert_close(load_file(two / "begun by one.safetensors"), one_process(tmp_path, steps=4).state_dict())
    assert len(read_log(two / "begun by one" / "log.jsonl")) == 4


def test_one_process_goes_on_where_two_stopped_and_says_that_it_seeds_anew(two, tmp_path, capsys):
    begun = shutil.copytree(two / "ibot ddp", tmp_path / "begun")
    shutil.rmtree(begun / "checkpoints" / "step_00000003")
    assert_close(one_process(begun).state_dict(), one_process(tmp_path / "straight").state_dict())
    assert "written by 2 process(es) on cpu and goes on with 1 on cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "part"), [("ibot", "teacher"), ("mae", "autoencoder.vit")])
def test_the_encoder_of_a_sharded_run_is_exported_and_judged_whole(two, name, part):
    weights, out = load_file(two / f"{name} sharded.safetensors"), two / f"watched {name}"
    exported = load_file(out / "encoder")
    for key, value in exported.items():
        assert torch.equal(value, weights[f"{part}.{key}"]), key
    assert sorted(path.name for path in (out / "encoders").iterdir()) == ["step_00000002", "step_00000003"]
    last = load_file(out / "encoders" / "step_00000003")
    assert all(torch.equal(last[key], exported[key]) for key in exported)
    records = read_log(out / "log.jsonl")
    assert len({record["features"] for record in records}) == len(records) == 3
    assert records[-1]["weight"] == pytest.approx(float(exported["layernorm.weight"].sum()), rel=1e-6)


def test_a_sharded_checkpoint_is_a_start_of_a_new_run_once_it_is_merged(two, tmp_path):
    run = shutil.copytree(two / "ibot sharded", tmp_path / "run")
    checkpoint = run / "checkpoints" / "step_00000003"
    with pytest.raises(
        UserError, match=rf"run `accelerate merge-weights {checkpoint}/pytorch_model_fsdp_0 {checkpoint}`"
    ):
        small_loop(tmp_path / "new", init_from=str(run))
    merge_fsdp_weights(f"{checkpoint}/pytorch_model_fsdp_0", str(checkpoint))
    weights = small_loop(tmp_path / "new", init_from=str(run)).method.state_dict()
    assert_close(weights, load_file(two / "ibot sharded.safetensors"), within=0.0)
