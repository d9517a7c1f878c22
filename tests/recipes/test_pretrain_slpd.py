"""SLPD as a user trains it: its clusters come when they are due, are saved and found again, and released is a hierarchy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from launched_runs import assert_a_killed_run_ends_as_one_that_was_not, launcher
from programs import run_recipe_here
from region_features import make_region_features
from safetensors.torch import load_file
from torch import multiprocessing
from transformers import AutoModel

from hf_pathology.errors import UserError
from hf_pathology.features.region_blocks import RegionBlocks
from hf_pathology.modeling.configuration_hipt import HiptRegionConfig
from hf_pathology.modeling.configuration_slpd import SlpdConfig
from hf_pathology.modeling.modeling_hipt import HiptModel
from hf_pathology.modeling.modeling_slpd import SlpdForPreTraining
from hf_pathology.recipes import pretrain_slpd
from hf_pathology.recipes.slide_prototypes import ClusterOptions, SlidePrototypes
from hf_pathology.training.log import read_log


CONFIG = Path(__file__).resolve().parents[2] / "recipes" / "configs" / "slpd_tiny.yaml"
SHORT = ["--steps", "8", "--warmup_steps", "2", "--checkpoint_every", "2", "--first_clusters", "3"]


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    return make_region_features(tmp_path_factory.mktemp("regions"))[0]


def words(features: Path, out: Path, *more) -> list[str]:
    return ["--config", str(CONFIG), "--features", str(features), "--out", str(out), *map(str, more)]


def test_prototypes_join_the_loss_when_they_are_due(features, tmp_path):
    pretrain_slpd.main(words(features, tmp_path / "run"))
    records = list(read_log(tmp_path / "run" / "log.jsonl"))
    assert len(records) == 20 and all(np.isfinite(record["loss"]) for record in records)
    for record in records:
        parts = record["cls_loss"] + record["own_loss"] + record["neighbour_loss"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
        assert (record["own_loss"] > 0) == (record["neighbour_loss"] > 0) == (record["step"] >= 4)
    state = load_file(tmp_path / "run" / "checkpoints" / "step_00000020" / "model.safetensors")
    assert state["cluster_of"].unique().tolist() == [0, 1]
    torch.testing.assert_close(state["prototypes"].norm(dim=-1), torch.ones(3, 2))
    assert all(slide not in near for slide, near in enumerate(state["neighbours"].tolist()))
    assert type(AutoModel.from_pretrained(tmp_path / "run" / "encoder")) is HiptModel


def test_the_original_artefacts_make_another_run(features, tmp_path):
    losses = []
    for number, flag in enumerate(([], ["--original_artefacts"])):
        pretrain_slpd.main(words(features, tmp_path / str(number), *SHORT, *flag))
        losses.append([record["loss"] for record in read_log(tmp_path / str(number) / "log.jsonl")])
    assert losses[0][:3] == losses[1][:3] and losses[0][3] != losses[1][3]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bits_with_its_clusters(features, tmp_path, processes):
    launched = launcher("pretrain_slpd.py", processes)
    assert_a_killed_run_ends_as_one_that_was_not(lambda out: [*launched, *words(features, out, *SHORT)], tmp_path)


def clusters_of(folder: Path) -> dict[str, np.ndarray]:
    regions = RegionBlocks(folder)
    torch.manual_seed(0)
    trunk = HiptRegionConfig(
        input_size=16, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, grid_size=3
    )
    config = SlpdConfig(
        trunk, num_regions=len(regions), num_slides=3, num_clusters=2, out_dim=8, head_bottleneck_dim=6
    )
    model = SlpdForPreTraining(config)
    options = ClusterOptions(num_clusters=2, min_regions=4)
    prototypes = SlidePrototypes(model, regions, options, crop=3, epoch=5, seed=0, accelerator=Accelerator(cpu=True))
    return vars(prototypes.clusters())


def cluster_and_save(rank: int, folder: Path, out: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    np.savez(out / f"{rank}.npz", **clusters_of(folder))
    torch.distributed.destroy_process_group()


def test_two_processes_cluster_as_one_does(features, tmp_path, monkeypatch):
    expected = clusters_of(features)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}.items():
        monkeypatch.setenv(name, value)
    multiprocessing.spawn(cluster_and_save, (features, tmp_path), nprocs=2)
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_sharded_weights_are_refused(features, monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(accelerator.state._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match=r"FSDP shards it: launch with recipes/accelerate/ddp.yaml"):
        SlidePrototypes(
            None, RegionBlocks(features), ClusterOptions(), crop=3, epoch=5, seed=0, accelerator=accelerator
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_clusters", "5"], "num_clusters is 5 and min_regions 4"),
        (["--min_regions", "1000"], "0 of 3 slides have min_regions, 1000, or more"),
        (["--num_neighbours", "3"], "too few for 3 neighbours of each"),
        (["--limit", "1"], "too few for 1 neighbours of each"),
    ],
)
def test_a_mistake_is_one_line(features, tmp_path, options, message):
    done = run_recipe_here(pretrain_slpd.main, *words(features, tmp_path / "out"), *options)
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
