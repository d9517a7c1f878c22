"""The numbers of the original codes, and what their heads' weights are called here.

A case is one file of tensors: a small one in `tests/fixtures`, which is always there, or the whole one in the folder of
golden tensors. `@pytest.mark.parametrize("case", cases(...), indirect=True)` runs a test on both.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import ViTConfig


FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Case:
    """One run of an original code: its weights, what went in, what came out, and how it was set up."""

    state: dict[str, torch.Tensor]
    input: dict[str, torch.Tensor]
    output: dict[str, torch.Tensor]
    meta: dict


def read_case(file: Path) -> Case:
    """The case in `file`; half precision, in which nothing was lost, comes back as float32."""
    parts: dict[str, dict[str, torch.Tensor]] = {"state": {}, "input": {}, "output": {}}
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            part, name = key.split("/", 1)
            tensor = tensors.get_tensor(key)
            parts[part][name] = tensor.float() if tensor.dtype == torch.float16 else tensor
        return Case(**parts, meta=json.loads(tensors.metadata()["meta"]))


def cases(*names: str) -> list:
    """Parameters for the fixture `case`: each of `names` from `tests/fixtures` where it is there, and from the goldens."""
    small = [
        pytest.param(("fixtures", name), id=name) for name in names if (FIXTURES / f"{name}.safetensors").is_file()
    ]
    return small + [pytest.param(("goldens", name), id=f"{name}-golden") for name in names]


def vit_config(arguments: dict) -> ViTConfig:
    """The config of an original ViT, whose constructors give LayerNorm an epsilon of 1e-6."""
    return ViTConfig(
        image_size=arguments["img_size"][0],
        patch_size=arguments["patch_size"],
        hidden_size=arguments["embed_dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        intermediate_size=arguments["mlp_ratio"] * arguments["embed_dim"],
        layer_norm_eps=arguments.get("norm_eps", 1e-6),
    )


def head_options(arguments: dict) -> dict:
    """The arguments of our `ProjectionHead` for those of an original DINOHead or iBOTHead."""
    own_patches = "patch_out_dim" in arguments and not arguments.get("shared_head", False)
    return {
        "out_dim": arguments["out_dim"],
        "patch_out_dim": arguments["patch_out_dim"] if own_patches else None,
        "hidden_dim": arguments["hidden_dim"],
        "bottleneck_dim": arguments["bottleneck_dim"],
        "layers": arguments.get("nlayers", 3),
        "norm": "bn" if arguments.get("use_bn") else arguments.get("norm"),
        "unit_norm": arguments["norm_last_layer"],
    }


def head_weights(state: dict[str, torch.Tensor], arguments: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights of an original DINOHead or iBOTHead, the keys that start with `prefix`, under our names."""
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    renamed = {"last_layer2.": "patch_last_layer."}
    if arguments.get("nlayers", 3) == 1:
        renamed["mlp."] = "mlp.0."
    if arguments["bottleneck_dim"] == 0:
        renamed |= {"mlp.4.": "last_layer.", "mlp2.": "patch_last_layer."}
    twice = [name for name, given in (("last_layer2.", "shared_head"), ("mlp.4.", "norm")) if arguments.get(given)]
    weights = {}
    for key, tensor in state.items():
        if not any(key.startswith(name) for name in twice):  # the second name of tensors that are stored twice
            start = next((name for name in renamed if key.startswith(name)), "")
            weights[renamed.get(start, "") + key.removeprefix(start)] = tensor
    return weights
