"""ResNets as torchvision names them, and as transformers does.

`downsample_in_bottleneck` is False: the stride is on the 3 x 3 convolution, as in torchvision ("v1.5"), and so in SimCLR, MoCo
and BYOL, which build on it.
"""

import re
from collections.abc import Iterable

import torch
from transformers import ResNetConfig, ResNetModel

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.conversion.original_vit import with_weights


Tensors = dict[str, torch.Tensor]

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def resnet_name(key: str) -> str:
    """What transformers calls the parameter or buffer `key` of torchvision. Raises KeyError for one that is of no trunk."""
    parts = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    if found := re.fullmatch(r"(conv|bn)1\.(\w+)", key):
        return f"embedder.embedder.{parts[found[1]]}.{found[2]}"
    if found := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(\w+)", key):
        stage, layer, part, number, kind = found.groups()
        return f"encoder.stages.{int(stage) - 1}.layers.{layer}.layer.{int(number) - 1}.{parts[part]}.{kind}"
    if found := re.fullmatch(r"layer(\d)\.(\d+)\.downsample\.([01])\.(\w+)", key):
        stage, layer, part, kind = found.groups()
        return f"encoder.stages.{int(stage) - 1}.layers.{layer}.shortcut.{parts[part]}.{kind}"
    raise KeyError(key)


def resnet_keys(names: Iterable[str]) -> list[str]:
    """The keys of a ResNet of torchvision, with as many blocks in its four stages as `names` has."""
    names = set(names)
    depths = resnet_depths(names)
    convolutions = 3 if "layer1.0.conv3.weight" in names else 2
    keys = ["conv1.weight", *(f"bn1.{kind}" for kind in NORM)]
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            start = f"layer{stage}.{block}"
            for number in range(1, convolutions + 1):
                keys += [f"{start}.conv{number}.weight", *(f"{start}.bn{number}.{kind}" for kind in NORM)]
            if block == 0 and (stage > 1 or convolutions == 3):
                keys += [f"{start}.downsample.0.weight", *(f"{start}.downsample.1.{kind}" for kind in NORM)]
    old = f"bn1.{NORM[-1]}" not in names  # of before torch 0.4.1, which did not count batches
    return [key for key in keys if not (old and key.endswith(NORM[-1]))]


def resnet_depths(names: Iterable[str]) -> list[int]:
    """The blocks in each of the four stages."""
    found = [match for name in names if (match := re.match(r"layer([1-4])\.(\d{1,4})\.", name))]
    return [1 + max((int(each[2]) for each in found if int(each[1]) == stage), default=-1) for stage in range(1, 5)]


def resnet_config(tensors: Tensors) -> ResNetConfig:
    """The configuration of a ResNet, as its tensors imply it. Raises UserError for a stem that is not of ImageNet's size."""
    stem = tensors["conv1.weight"]
    if stem.shape[2:] != (7, 7):
        raise UserError(f"conv1.weight is of {tuple(stem.shape)}: a ResNet for small images is not converted")
    deepest = "conv3" if "layer1.0.conv3.weight" in tensors else "conv2"
    return ResNetConfig(
        num_channels=stem.shape[1],
        embedding_size=stem.shape[0],
        hidden_sizes=[len(tensors[f"layer{stage}.0.{deepest}.weight"]) for stage in range(1, 5)],
        depths=resnet_depths(tensors),
        layer_type="bottleneck" if deepest == "conv3" else "basic",
        downsample_in_bottleneck=False,
    )


def whole_resnet(tensors: Tensors) -> ResNetModel:
    """The ResNet with these tensors of torchvision. Raises UserError when their shapes are not those of a plain one."""
    config = resnet_config(tensors)
    with torch.device("meta"):
        model = ResNetModel(config)
    counters = {name: torch.tensor(0) for name in model.state_dict() if name.endswith(NORM[-1])}
    return with_weights(model, counters | {resnet_name(key): tensor for key, tensor in tensors.items()})
