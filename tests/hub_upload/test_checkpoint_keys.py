"""Every key of a checkpoint is used, left out by rule or unexpected, and what cannot be converted is told in one line."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from original_checkpoints import (
    byol_checkpoint,
    dino_checkpoint,
    mae_checkpoint,
    moco_checkpoint,
    prefixed,
    saved,
    simclr_checkpoint,
)
from originals import FIXTURES, read_case
from torchvision.models import resnet18

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.conversion.checkpoint_formats import FORMATS
from hf_pathology.hub_upload.conversion.checkpoint_keys import keep, take_network
from hf_pathology.hub_upload.conversion.convert import KEYS, Conversion, ConversionOptions, convert


FILE = Path("checkpoint.pth")


def hipt_state(part: str) -> dict[str, torch.Tensor]:
    """The weights of one level of HIPT, small ones: "vit256." or "vit4k."."""
    state = read_case(FIXTURES / "07_hipt_weights.safetensors").state
    return {key.removeprefix(part): tensor for key, tensor in state.items() if key.startswith(part)}


VIT, REGION = hipt_state("vit256."), hipt_state("vit4k.")
MAE = read_case(FIXTURES / "06_mae_normpix_true.safetensors").state
RESNET = {name: tensor for name, tensor in resnet18().state_dict().items() if not name.startswith("fc.")}
LAYOUTS = {  # what the original trainers and those who published their files have written
    "dino": dino_checkpoint(VIT),
    "dino, backbone": VIT,
    "dino, compiled": {"teacher": prefixed(VIT, "_orig_mod.module.backbone.")},
    "dino, resnet": dino_checkpoint({**RESNET, "norm.weight": torch.ones(1)}),
    "ibot": dino_checkpoint(VIT, {**VIT, "masked_embed": torch.ones(1, 48)}, loss="ibot_loss"),
    "ibot, teacher": {"state_dict": VIT},
    "phikon": dino_checkpoint(VIT, {**VIT, "masked_embed": torch.ones(1, 48)}, loss="ibot_loss"),
    "mae": {"model": {name: tensor for name, tensor in MAE.items() if "decoder" not in name and name != "mask_token"}},
    "mae, whole": mae_checkpoint(MAE),
    "mae-full": mae_checkpoint(MAE),
    "hipt, tiles": dino_checkpoint(VIT),
    "hipt, regions": dino_checkpoint(REGION),
    "slpd": dino_checkpoint({**REGION, "prototypes.weight": torch.ones(64, 24)}),
    "intelligens": VIT,
    "intelligens, trainer": dino_checkpoint(VIT),
    "simclr": simclr_checkpoint(RESNET),
    "simclr, parallel": {"state_dict": prefixed(RESNET, "model.module.convnet."), "hparams": Namespace()},
    "moco": moco_checkpoint(RESNET, RESNET),
    "byol": byol_checkpoint(RESNET, RESNET),
}
LEFT = {"dino, resnet": ["norm.weight"]}  # which stands here only to tell the width of the made-up head


def all_tensors(content: dict) -> int:
    """The tensors of a checkpoint that are weights of some network."""
    inner = [content, *(value for name, value in content.items() if isinstance(value, dict) and "loss" not in name)]
    return sum(isinstance(value, torch.Tensor) for part in inner for value in part.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_is_used_or_left_out_by_a_rule(layout):
    content, form = LAYOUTS[layout], layout.split(",")[0]
    taken = take_network(content, form, FILE)
    tensors = keep(taken, KEYS[taken.kind](taken.tensors), form, FILE)
    assert taken.unexpected == LEFT.get(layout, [])
    beside = {"centres of the loss", "gradient scaler", "optimizer state", "schedule", "progress of the run"}
    networks = sum(count for group, count in taken.left_out.items() if group not in beside | {"settings of the run"})
    assert len(tensors) + networks + len(taken.unexpected) == all_tensors(content)


@pytest.mark.parametrize(
    ("layout", "network"),
    [("dino", "student"), ("ibot", "student"), ("slpd", "student"), ("moco", "encoder_k"), ("byol", "net_target")],
)
def test_the_other_network_is_taken_when_it_is_asked_for(layout, network):
    taken = take_network(LAYOUTS[layout], layout, FILE, student=True)
    keep(taken, KEYS[taken.kind](taken.tensors), layout, FILE)
    assert taken.name == network and taken.unexpected == []
    if layout in ("dino", "ibot"):
        student = LAYOUTS[layout]["student"]["module.backbone.norm.weight"]
        assert torch.equal(taken.tensors["norm.weight"], student)


def test_prefixes_are_stripped_from_the_start_of_a_name_only():
    content = {"state_dict": {**VIT, "extra.module.weight": torch.ones(1), "backbone_extra": torch.ones(1)}}
    taken = take_network(content, "dino", FILE)
    keep(taken, KEYS["vit"](taken.tensors), "dino", FILE)
    assert sorted(taken.unexpected) == ["backbone_extra", "extra.module.weight"]


def test_what_no_rule_knows_is_said_to_be_unexpected():
    content = {**dino_checkpoint(VIT), "wandb": {"id": "x"}}
    content["teacher"]["something.weight"] = torch.ones(3)
    taken = take_network(content, "dino", FILE)
    keep(taken, KEYS["vit"](taken.tensors), "dino", FILE)
    assert sorted(taken.unexpected) == ["something.weight", "wandb"]


# Mistakes.


def changed(**tensors: torch.Tensor | None) -> dict:
    """The weights of a ViT, some of them others, or away where they are None."""
    state = {**VIT, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def test_a_checkpoint_within_itself_ends():
    endless: dict = {}
    endless["model"] = endless
    with pytest.raises(UserError, match="holds no encoder of mae, which is a ViT: its names begin with model"):
        take_network(endless, "mae", FILE)


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("dino", LAYOUTS["moco"], "looks like a checkpoint of moco, not of dino"),
        ("dino", LAYOUTS["ibot"], "looks like a checkpoint of ibot or phikon, not of dino"),
        ("dino", LAYOUTS["mae-full"], "looks like a checkpoint of mae or mae-full"),
        ("mae", LAYOUTS["dino"], "looks like a checkpoint of dino, hipt, slpd or intelligens, not of mae"),
        ("dino", LAYOUTS["hipt, regions"], "holds a ViT over regions .*: convert it as hipt or slpd"),
        ("simclr", VIT, "holds a ViT, not a ResNet: convert it as dino, ibot, phikon, mae, hipt"),
        ("ibot", RESNET, "holds a ResNet, not a ViT: convert it as dino, simclr, moco or byol"),
        ("mae-full", LAYOUTS["mae"], "holds a ViT, not an MAE with its decoder"),
        ("vit", {"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(1)}, "holds a Swin or BEiT"),
        (
            "dino",
            {"weight": torch.ones(1)},
            "holds no encoder of dino, which is a ViT or a ResNet: its names begin with weight",
        ),
        (
            "dino",
            changed(blocks__1__mlp__fc1__weight=None),
            "lacks 1 of 30 tensors of a ViT: blocks.1.mlp.fc1.weight",
        ),
        ("dino", changed(norm__weight=None, fc_norm__weight=VIT["norm.weight"]), "pools by the mean of its patches"),
        ("dino", changed(blocks__1__gamma_1=torch.ones(48)), "holds blocks.1.gamma_1, which a ViT has not"),
        ("dino", changed(reg_token=torch.ones(1, 4, 48)), "holds reg_token, which a ViT has not"),
        ("dino", changed(norm__bias=torch.full((48,), float("nan"))), "not finite, in norm.bias"),
        ("dino", changed(norm__bias=torch.full((48,), float("inf"))), "not finite, in norm.bias"),
        ("dino", changed(norm__bias=torch.ones(48, dtype=torch.int8)), "norm.bias as torch.int8"),
        ("dino", changed(norm__bias=torch.ones(1).expand(48)), "repeats few numbers"),
        ("dino", changed(norm__bias=torch.ones(48).to_sparse()), "no plain tensor of numbers as norm.bias"),
        ("dino", changed(norm__bias="weights"), "no plain tensor of numbers as norm.bias"),
        ("dino", changed(norm__bias=torch.ones(47)), r"layernorm.bias is of \(47,\), and of \(48,\)"),
        ("dino", changed(pos_embed=torch.ones(1, 199, 48)), "not of a class token and a square"),
        ("dino", changed(pos_embed=torch.ones(48)), "not of a class token and a square"),
        ("dino", changed(patch_embed__proj__weight=torch.ones(48, 3, 16, 8)), "patches of a ViT are square"),
        ("dino", changed(patch_embed__proj__weight=torch.ones(1)), "patches of a ViT are square"),
        ("dino", changed(blocks__0__mlp__fc1__weight=torch.tensor(1.0)), "shapes are not those of a ViT"),
        ("hipt", {**REGION, "phi.0.weight": torch.ones(4)}, "shapes are not those of a ViT over regions"),
        ("simclr", {**RESNET, "conv1.weight": torch.ones(64, 3, 3, 3)}, "for small images is not converted"),
        ("simclr", {**RESNET, "conv1.weight": torch.tensor(1.0)}, "for small images is not converted"),
        ("simclr", {**RESNET, "layer1.0.conv1.weight": torch.ones(2)}, "and of .* in the architecture"),
        ("dino", {"teacher": {1: torch.ones(1)}}, "holds no weights by their names in teacher"),
        ("dino", {**VIT, "module.cls_token": VIT["cls_token"]}, "holds cls_token twice"),
    ],
)
def test_what_cannot_be_converted_is_told_in_one_line(tmp_path, form, content, message):
    file = saved(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match=message) as refused:
        convert(form, [file], ConversionOptions(num_heads=6 if form in ("dino", "ibot") else None))
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


def converted(tmp_path: Path, form: str, content: dict, **options: object) -> Conversion:
    return convert(form, [saved(content, tmp_path / "c.pth")], ConversionOptions(**options))


@pytest.mark.parametrize(
    ("form", "content", "options", "message"),
    [
        ("dino", VIT, {}, "no tensor says how many heads a ViT of width 48 has: pass --num-heads"),
        ("dino", VIT, {"num_heads": 7}, "7 heads do not divide the width of 48"),
        ("dino", VIT, {"num_heads": 6, "image_size": 100}, "100 is no multiple of the patch size, 16"),
        ("dino", VIT, {"num_heads": 6, "student": True}, "holds no student: leave out --student"),
        ("dino", {"student": VIT}, {"num_heads": 6}, "holds the student and no teacher: pass --student"),
        ("dino", {"teacher": VIT}, {"num_heads": 6, "student": True}, "holds the teacher and no student: leave out"),
        ("mae", LAYOUTS["mae"], {"student": True}, "holds one network: leave out --student"),
        ("moco", LAYOUTS["moco"], {"num_heads": 6}, "a ResNet has no use for --num-heads"),
        ("mae-full", MAE, {"num_heads": 3, "image_size": 32}, "no use for --image-size"),
        ("mae-full", MAE, {"num_heads": 3, "decoder_heads": 5}, "pass --decoder-heads"),
        ("hipt", REGION, {"num_heads": 6}, "no use for --num-heads"),
        ("dino", VIT, {"num_heads": 6, "statistics": "mine"}, "choose one of imagenet, half, none"),
    ],
)
def test_options_that_do_not_fit_are_told_in_one_line(tmp_path, form, content, options, message):
    with pytest.raises(UserError, match=message):
        converted(tmp_path, form, content, **options)


def test_levels_that_do_not_belong_together_are_told(tmp_path):
    tiles, regions = saved(VIT, tmp_path / "tiles.pth"), saved(REGION, tmp_path / "regions.pth")
    options = ConversionOptions(num_heads=6)
    with pytest.raises(UserError, match="hold the same level"):
        convert("hipt", [tiles, tiles], options)
    with pytest.raises(UserError, match="only the two levels of hipt and slpd go together"):
        convert("dino", [tiles, regions], options)
    wide = saved({**REGION, "phi.0.weight": torch.ones(24, 50)}, tmp_path / "wide.pth")
    with pytest.raises(UserError, match="takes features of length 50, and the first gives 48"):
        convert("hipt", [tiles, wide], options)


def test_an_unknown_format_is_answered_with_those_that_are_known(tmp_path):
    with pytest.raises(UserError, match=f"choose one of {', '.join(FORMATS)}"):
        converted(tmp_path, "dinov9", VIT)


# What the tensors do not say.


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_the_number_of_heads_is_that_of_the_published_vits(tmp_path, width, heads):
    state = {name: tensor for name, tensor in VIT.items() if not name.startswith("blocks.1.")}
    grown = {}
    for name, tensor in state.items():
        shape = [edge * width // 48 if edge % 48 == 0 else edge for edge in tensor.shape]
        grown[name] = torch.zeros(shape)
    model = converted(tmp_path, "dino", grown).model
    assert model.config.hidden_size == width and model.config.num_attention_heads == heads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_are_converted_to_float32(tmp_path, dtype):
    content = {name: tensor.to(dtype) for name, tensor in VIT.items()}
    model = converted(tmp_path, "dino", content, num_heads=6).model
    assert torch.equal(model.layernorm.weight, VIT["norm.weight"].to(dtype).float())


def test_a_vit_without_biases_of_query_key_and_value_has_none(tmp_path):
    content = {name: tensor for name, tensor in VIT.items() if not name.endswith("qkv.bias")}
    assert converted(tmp_path, "dino", content, num_heads=6).model.config.qkv_bias is False


@pytest.mark.parametrize(
    ("form", "tile_size", "mean"),
    [("dino", 224, 0.485), ("hipt", 256, 0.5), ("slpd", 256, 0.485), ("intelligens", 224, 0.485)],
)
def test_tiles_are_those_that_the_authors_use(tmp_path, form, tile_size, mean):
    conversion = converted(tmp_path, form, VIT, num_heads=6)
    assert (conversion.tile_size, conversion.mean[0]) == (tile_size, mean)
    assert conversion.model.config.image_size == tile_size
    assert converted(tmp_path, form, VIT, num_heads=6, statistics="none").std == [1.0] * 3
