"""Which tensors of a checkpoint are the encoder, and what became of every other: used, left out by rule, or unexpected."""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.conversion.checkpoint_formats import BESIDE_THE_WEIGHTS, FORMATS, Network


Tensors = dict[str, torch.Tensor]

WRAPPERS = ("state_dict", "model", "net")  # entries that hold the weights, and are no network's name
MAX_DEPTH = 4  # of entries in entries
PARALLEL_PREFIXES = ("module.", "model.module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
KINDS = {  # of networks: a name that shows one, and its title
    "region": ("phi.0.weight", "a ViT over regions (HIPT's second level)"),
    "mae": ("decoder_embed.weight", "an MAE with its decoder"),
    "vit": ("blocks.0.attn.qkv.weight", "a ViT"),
    "hub_vit": ("embeddings.patch_embeddings.projection.weight", "a ViT in transformers' names"),
    "resnet": ("layer1.0.conv1.weight", "a ResNet"),
}
OTHER_NETWORKS = {  # what is not converted, by a part of a name
    "embedder.embedder.convolution": "a ResNet in transformers' names, which needs no conversion",
    "relative_position_bias_table": "a Swin or BEiT",
    "patch_embed.norm.": "a Swin",
    "blocks.0.0.": "a DINOv2 in chunks",
    "stages.0.": "a ConvNeXt",
}
# What a trunk may have beside its layers, and what then decides its output, too.
DECISIVE = ("fc_norm", "norm_pre", "reg_token", "register_tokens", "dist_token", "embeddings.distillation_token")


@dataclass
class TakenNetwork:
    """One network of a checkpoint, and the account of all that the checkpoint holds.

    Attributes:
        name: what its authors call it.
        kind: what it is, one of KINDS.
        tensors: its parameters and buffers by its own names; after `keep` those that are used.
        others: names and values of what else lies beside it.
        left_out: how many keys of which kind are not needed.
        unexpected: keys that no rule knows.
        settings: plain values that the training code stored with it.
    """

    name: str
    kind: str
    tensors: dict[str, Any]
    others: dict[str, Any]
    left_out: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def take_network(content: Mapping[str, Any], form: str, path: Path, student: bool = False) -> TakenNetwork:
    """The network of the checkpoint `content` that the format `form` is about, or with `student` the other one.

    Raises UserError when it is not there, when the file looks like one of another format, or of another architecture.
    """
    networks = FORMATS[form].networks
    if student and len(networks) < 2:
        raise UserError(f"a checkpoint of {form} holds one network: leave out --student")
    refuse_look_alikes(content, form, path)
    chosen = networks[student] if networks else Network("encoder")
    opened, content, account = open_entries(content, networks, chosen, path)
    flat = without_parallel_prefixes(content, path)
    prefix = next((each for each in chosen.prefixes if any(key.startswith(each) for key in flat)), "")
    alone = opened != chosen.entry if chosen.entry else not prefix
    if student and alone:
        raise UserError(f"{path} holds no {chosen.name}: leave out --student")
    inner = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
    others = {key: value for key, value in flat.items() if not key.startswith(prefix)}
    name = "the only network of the file" if alone and len(networks) > 1 else chosen.name
    taken = TakenNetwork(name, kind_of(inner, form, path), inner, others, **account)
    for network in networks:
        if network is not chosen and network.prefixes and not network.entry:
            leave_out(taken.others, network.prefixes, f"{network.name} network", taken.left_out)
    return taken


def open_entries(
    content: Mapping[str, Any], networks: tuple[Network, ...], chosen: Network, path: Path
) -> tuple[str | None, Mapping[str, Any], dict[str, Any]]:
    """The entry in which the weights of `chosen` lie (None for no entry), the weights, and what became of other entries."""
    left_out: Counter[str] = Counter()
    unexpected: list[str] = []
    settings: dict[str, Any] = {}
    opened = None
    for _ in range(MAX_DEPTH):
        entry = None if opened and opened == chosen.entry else entry_of(content, networks, chosen, path)
        if entry is None:
            break
        for other, value in content.items():
            group = group_of_entry(other, networks)
            if other != entry and group is None:
                unexpected.append(other)
            elif other != entry:
                left_out[group] += tensors_in(value)
                if group == "settings of the run":
                    settings |= vars(value) if isinstance(value, Namespace) else {other: value}
        content, opened = content[entry], entry
        if not all(isinstance(key, str) for key in content):
            raise UserError(f"{path} holds no weights by their names in {entry}: it cannot be converted")
    return opened, content, {"left_out": left_out, "unexpected": unexpected, "settings": settings}


def keep(taken: TakenNetwork, expected: Iterable[str], form: str, path: Path) -> Tensors:
    """The `expected` tensors as float32, all of which must be there; every other key is counted in `taken`.

    Raises UserError when one is missing, no tensor of numbers, or not finite, and when the trunk has others, too.
    """
    expected = list(expected)
    missing = [key for key in expected if key not in taken.tensors]
    if missing:
        pooled = any(key.startswith("fc_norm") for key in taken.tensors)
        raise UserError(
            f"{path} lacks {len(missing)} of {len(expected)} tensors of {KINDS[taken.kind][1]}: {', '.join(missing[:3])}"
            f"{' ...' * (len(missing) > 3)}{'; it pools by the mean of its patches' * pooled}"
        )
    rest = {key: value for key, value in taken.tensors.items() if key not in set(expected)}
    for start, group in FORMATS[form].left_out:
        leave_out(rest, (start,), group, taken.left_out)
        leave_out(taken.others, (start,), group, taken.left_out)
    parts = {key.split(".")[0] for key in expected}
    for key in rest:
        if key.split(".")[0] in parts or key.startswith(DECISIVE):
            raise UserError(f"{path} holds {key}, which {KINDS[taken.kind][1]} has not: it is another architecture")
    taken.unexpected += [*rest, *taken.others]
    taken.tensors = {key: finite(key, taken.tensors[key], path) for key in expected}
    return taken.tensors


def finite(name: str, value: Any, path: Path) -> torch.Tensor:
    """The weight as float32, or an integer as it is. Raises UserError when it is no tensor of finite numbers."""
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized or value.is_complex():
        raise UserError(f"{path} holds no plain tensor of numbers as {name}: it cannot be converted")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{path} repeats few numbers as the {tuple(value.shape)} of {name}: these are no weights")
    if not value.is_floating_point():
        if name.endswith("num_batches_tracked"):
            return value.detach()
        raise UserError(f"{path} holds {name} as {value.dtype}: convert weights that are not quantised")
    value = value.detach().float()
    if not torch.isfinite(value).all():
        raise UserError(
            f"{path} has weights that are not finite, in {name}: take a checkpoint from before the run broke"
        )
    return value


def entry_of(content: Mapping[str, Any], networks: tuple[Network, ...], chosen: Network, path: Path) -> str | None:
    """The entry of `content` in which the weights lie, None where they lie in it itself."""
    entries = [network.entry for network in networks if isinstance(content.get(network.entry), dict)]
    if chosen.entry in entries:
        return chosen.entry
    if entries:
        raise UserError(
            f"{path} holds the {entries[0]} and no {chosen.entry}: {'leave out' if chosen is networks[1] else 'pass'} --student"
        )
    return next((entry for entry in WRAPPERS if isinstance(content.get(entry), dict)), None)


def group_of_entry(entry: str, networks: tuple[Network, ...]) -> str | None:
    """What an entry of a checkpoint is that holds not the weights, None when no rule knows it."""
    return f"{entry} network" if entry in [network.entry for network in networks] else BESIDE_THE_WEIGHTS.get(entry)


def without_parallel_prefixes(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`content` with names as they were before the model was wrapped for several devices or compiled."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = key
        while prefix := next((each for each in PARALLEL_PREFIXES if name.startswith(each)), ""):
            name = name.removeprefix(prefix)
        if name in flat:
            raise UserError(f"{path} holds {name} twice, once as {key}: it cannot be converted")
        flat[name] = value
    return flat


def leave_out(values: dict[str, Any], starts: tuple[str, ...], group: str, left_out: Counter[str]) -> None:
    """Takes what begins with one of `starts` out of `values`, and counts it."""
    for key in [key for key in values if key.startswith(starts)]:
        left_out[group] += tensors_in(values.pop(key))


def tensors_in(value: Any) -> int:
    """How many tensors a dictionary holds, and 1 of anything else."""
    return sum(isinstance(each, torch.Tensor) for each in value.values()) or 1 if isinstance(value, dict) else 1


def kind_of(names: Iterable[str], form: str, path: Path) -> str:
    """What the network of these `names` is. Raises UserError when the format has none of it."""
    names, wanted = list(names), FORMATS[form].kinds
    kind = next((kind for kind, (mark, _) in KINDS.items() if mark in names), None)
    if kind == "mae" and kind not in wanted:
        kind = "vit"  # whose decoder is left out
    if kind in wanted:
        return kind
    asked = " or ".join(KINDS[each][1] for each in wanted)
    if kind is not None:
        able = listed([name for name, each in FORMATS.items() if kind in each.kinds])
        raise UserError(f"{path} holds {KINDS[kind][1]}, not {asked}: convert it as {able}")
    other = next((title for part, title in OTHER_NETWORKS.items() if any(part in name for name in names)), None)
    if other:
        raise UserError(f"{path} holds {other}, not {asked}: it cannot be converted")
    begin = ", ".join(names[:3]) or "nothing"
    raise UserError(f"{path} holds no encoder of {form}, which is {asked}: its names begin with {begin}")


def refuse_look_alikes(content: Mapping[str, Any], form: str, path: Path) -> None:
    """Raises UserError when names in the checkpoint show that it is of other formats than `form`."""
    names = [*content, *(key for value in content.values() if isinstance(value, dict) for key in value)]
    names = [name for name in names if isinstance(name, str)]
    marks = {mark for each in FORMATS.values() for mark in each.marks}
    found = {mark for mark in marks for name in names if name == mark or name.endswith(f".{mark}")}
    likely = [name for name, each in FORMATS.items() if found & set(each.marks)]
    if likely and form not in likely:
        raise UserError(f"{path} looks like a checkpoint of {listed(likely)}, not of {form}: pass that format")


def listed(names: list[str]) -> str:
    """The names as words between which one may choose."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
