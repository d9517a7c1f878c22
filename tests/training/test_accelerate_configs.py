"""The files in recipes/accelerate, as accelerate itself understands them."""

import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from launch_settings import CONFIGS, launch_arguments, launch_environment
from small_runs import METHODS, method
from torch.distributed.run import get_rdzv_endpoint
from transformers import AutoConfig, AutoModel


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines", "precision"),
    [
        ("cpu", DistributedType.NO, 1, 1, "no"),
        ("one_gpu", DistributedType.NO, 1, 1, "bf16"),
        ("ddp", DistributedType.MULTI_GPU, 8, 1, "bf16"),
        ("multinode", DistributedType.MULTI_GPU, 16, 2, "bf16"),
        ("fsdp2", DistributedType.FSDP, 8, 1, "bf16"),
    ],
)
def test_each_file_is_read_and_launches_what_its_name_says(name, kind, processes, machines, precision):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind
    arguments = launch_arguments(name)
    assert (arguments.num_processes, arguments.num_machines, arguments.mixed_precision) == (
        processes,
        machines,
        precision,
    )
    assert (arguments.multi_gpu, arguments.use_fsdp) == (
        kind == DistributedType.MULTI_GPU,
        kind == DistributedType.FSDP,
    )
    assert not arguments.use_deepspeed and bool(arguments.use_cpu) == (name == "cpu")
    assert arguments.dynamo_backend.upper() == "NO"


def test_every_file_is_among_those_that_are_tested():
    assert {path.stem for path in CONFIGS.iterdir()} == {"cpu", "one_gpu", "ddp", "multinode", "fsdp2"}


def test_each_of_several_machines_starts_its_share_and_meets_the_others_at_the_first():
    where = ["--main_process_ip", "node-a", "--machine_rank", "1"]
    arguments = launch_arguments("multinode", *where)
    prepare_multi_gpu_env(arguments)
    assert (arguments.nproc_per_node, arguments.nnodes, arguments.node_rank) == ("8", "2", 1)
    assert get_rdzv_endpoint(arguments) == "node-a:29500"


@pytest.fixture
def plugin(monkeypatch) -> FullyShardedDataParallelPlugin:
    """What a process makes of fsdp2.yaml."""
    environment = launch_environment("fsdp2")
    for key in [key for key in environment if key.startswith(("FSDP", "ACCELERATE"))]:
        monkeypatch.setenv(key, environment[key])
    return FullyShardedDataParallelPlugin()


def test_fsdp2_shards_layer_by_layer_keeps_layers_gathered_and_saves_shards(plugin):
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is False
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.cpu_offload is None or type(plugin.cpu_offload).__name__ == "OffloadPolicy"


@pytest.mark.parametrize("name", METHODS)
def test_fsdp2_finds_the_layers_of_each_method(plugin, name):
    plugin.set_auto_wrap_policy(method(name))
    layer = "ViTMAELayer" if name == "mae" else "ViTLayer"
    assert layer in {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("dinov2", "Dinov2Layer"),
        ("dinov2_with_registers", "Dinov2WithRegistersLayer"),
        ("dinov3_vit", "DINOv3ViTLayer"),
    ],
)
def test_fsdp2_finds_the_layers_of_other_trunks(plugin, kind, layer):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.device("meta"):
        trunk = AutoModel.from_config(AutoConfig.for_model(kind, **small))
    plugin.set_auto_wrap_policy(trunk)
    assert layer in {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}


SAYS_ITS_RANK = """
from hf_pathology.training.start import start
accelerator = start(cpu=True, seed=0)
accelerator.wait_for_everyone()
print(f"rank {accelerator.process_index} of {accelerator.num_processes}, {accelerator.distributed_type.name}", flush=True)
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_accelerate_starts_processes_that_find_each_other(tmp_path, machines):
    script = tmp_path / "recipe.py"
    script.write_text(SAYS_ITS_RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", port]
    if machines == 1:
        commands = [[*launch, "--config_file", str(CONFIGS / "ddp.yaml"), str(script)]]
    else:
        launch += ["--config_file", str(CONFIGS / "multinode.yaml"), "--num_machines", "2"]
        commands = [[*launch, "--machine_rank", str(rank), str(script)] for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    said = [process.communicate() for process in running]
    assert all(process.returncode == 0 for process in running), said
    ranks = sorted(rank for text, _ in said for rank in re.findall(r"rank (\d) of 2, MULTI_CPU", text))
    assert ranks == ["0", "1"], said  # which may have come on one line
