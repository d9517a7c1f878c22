"""Checkpoints as the original codes write them, made of any weights: what stands around the encoder, and in which names."""

import io
import pathlib
import tarfile
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch


State = dict[str, torch.Tensor]


def projection_head(width: int) -> State:
    """The head of DINO's, under its names."""
    names = [f"head.mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
    names += ["head.last_layer.weight_g", "head.last_layer.weight_v"]
    return {name: torch.ones(width) for name in names}


def dino_checkpoint(teacher: State, student: State | None = None, loss: str = "dino_loss", **settings: Any) -> dict:
    """What DINO's trainer saves, and those that were made of it (iBOT, HIPT, SLPD): all of a run, in DDP's names."""
    width = len(teacher["norm.weight"])
    student = {name: -tensor for name, tensor in teacher.items()} if student is None else student
    head = projection_head(width)
    return {
        "student": prefixed({**prefixed(student, "backbone."), **head}, "module."),
        "teacher": {**prefixed(teacher, "backbone."), **head},
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.zeros(width), "exp_avg_sq": torch.zeros(width)}},
            "param_groups": [{"lr": np.float64(1e-4), "betas": (0.9, 0.999), "params": [0]}],
        },
        "epoch": 100,
        "args": Namespace(arch="vit_small", patch_size=16, output_dir="/runs", use_fp16=True, **settings),
        loss: OrderedDict(center=torch.zeros(1, 8)),
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
    }


def mae_checkpoint(state: State, **settings: Any) -> dict:
    """What MAE's trainer saves."""
    args = Namespace(model="mae_vit_base_patch16", output_dir="./out", **settings)
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {"model": state, "optimizer": optimizer, "epoch": 799, "scaler": {"scale": 65536.0}, "args": args}


def moco_checkpoint(query: State, key: State) -> dict:
    """What MoCo v2's trainer saves."""
    head = {f"fc.{layer}.{kind}": torch.ones(2) for layer in (0, 2) for kind in ("weight", "bias")}
    state = {**prefixed({**query, **head}, "encoder_q."), **prefixed({**key, **head}, "encoder_k.")}
    state |= {"queue": torch.zeros(2, 4), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    optimizer = {"state": {}, "param_groups": []}
    return {"epoch": 200, "arch": "resnet50", "state_dict": prefixed(state, "module."), "optimizer": optimizer}


def simclr_checkpoint(state: State) -> dict:
    """What simclr-pytorch saves; its settings have the path of the run."""
    head = {
        f"projection.{part}.{kind}": torch.ones(2) for part in ("fc1", "bn1", "fc2", "bn2") for kind in ("weight",)
    }
    classifier = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}
    hparams = Namespace(problem="sim-clr", arch="ResNet50", root=pathlib.PosixPath("/logs/exman/000001"), lr=1.2)
    return {
        "state_dict": {**prefixed({**state, **classifier}, "convnet."), **head},
        "hparams": hparams,
        "opt_state_dict": {"state": {}, "param_groups": []},
        "iter": 1000,
    }


def byol_checkpoint(online: State, target: State) -> dict:
    """What PatchTCGA's BYOL trainer saves."""
    heads = {f"{head}.net.{part}.weight": torch.ones(2) for head in BYOL_HEADS for part in ("ln1", "bn", "ln2")}
    state = {**prefixed(online, "net_online.net."), **prefixed(target, "net_target.net."), **heads}
    state |= {"classifier_online.weight": torch.ones(20, 2), "classifier_online.bias": torch.ones(20)}
    empty = {"state": {}, "param_groups": []}
    rest = {"sch_state_dict": {"last_epoch": 7}, "scaler_state_dict": {}, "epoch": 40, "itr": 9, "num_updates": 8}
    return {"state_dict": state, "opt_state_dict": empty, **rest}


BYOL_HEADS = ("projector_online", "predictor_online", "projector_target")


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def saved(content: Any, path: Path, *, legacy: bool = False) -> Path:
    """`content` as torch saves it now, or as it did before version 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar_of(path: Path, members: dict[str, bytes], **links: str) -> Path:
    """A compressed tar of `members`, and of symbolic links by name."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path
