"""Our iBOT and DINO parts against numbers that the original codes computed (see `tests/originals.py`)."""

import copy

import pytest
import torch
from originals import FIXTURES, Case, cases, head_options, head_weights, read_case, vit_config
from torch import nn
from torch.testing import assert_close
from transformers import ViTModel

from hf_pathology.hub_upload.conversion.original_vit import vit_weights
from hf_pathology.modeling.configuration_ibot import IbotConfig
from hf_pathology.modeling.modeling_ibot import IbotForPreTraining
from hf_pathology.modeling.position import dino_position_table, use_dino_interpolation
from hf_pathology.modeling.projection_head import ProjectionHead
from hf_pathology.modeling.self_distillation import (
    RunningCenter,
    hidden_patch_loss,
    linear_warmup,
    teacher_probabilities,
    view_loss,
)


OUTPUT = {"atol": 2e-5, "rtol": 1e-5}
GRADIENT = {"atol": 1e-6, "rtol": 1e-4}
LOSS = {"atol": 2e-6, "rtol": 3e-7}  # the sum of 23 of one case has steps of 2e-6 in float32


def original_vit(state: dict[str, torch.Tensor], arguments: dict) -> ViTModel:
    vit = ViTModel(vit_config(arguments), add_pooling_layer=False, use_mask_token="masked_embed" in state)
    vit.load_state_dict(vit_weights(state))
    return vit.eval()


def original_head(case: Case) -> ProjectionHead:
    arguments = case.meta["args"]
    head = ProjectionHead(arguments["in_dim"], **head_options(arguments))
    if arguments.get("use_bn"):  # DINO has a norm for each layer, iBOT and we have one for all
        head.mlp[4] = copy.deepcopy(head.mlp[1])
    if arguments.get("act") == "relu":  # an option of the original's that we leave out
        head.mlp = nn.Sequential(*(nn.ReLU() if isinstance(layer, nn.GELU) else layer for layer in head.mlp))
    head.load_state_dict(head_weights(case.state, arguments))
    return head.eval()


def original_student(case: Case) -> IbotForPreTraining:
    """Our model with the student of an original multi-crop case."""
    arguments = {"nlayers": 3, "patch_out_dim": case.meta["head"]["out_dim"], "shared_head": True, **case.meta["head"]}
    options = head_options(arguments)
    config = IbotConfig(
        vit_config(case.meta["vit"]),
        head_layers=options.pop("layers"),
        head_norm=options.pop("norm"),
        head_hidden_dim=options.pop("hidden_dim"),
        head_bottleneck_dim=options.pop("bottleneck_dim"),
        drop_path_rate=0.0,
        **options,
    )
    model = IbotForPreTraining(config)
    weights = vit_weights(case.state, "backbone.")
    model.student.load_state_dict({"embeddings.mask_token": model.student.embeddings.mask_token, **weights})
    model.student_head.load_state_dict(head_weights(case.state, arguments, "head."))
    use_dino_interpolation(model.student)
    return model.eval()


def scores_of_forward(model: IbotForPreTraining, layer: nn.Module, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """What the prototypes in `layer` of the student's head say in one `forward`."""
    scores = []
    handle = layer.register_forward_hook(lambda module, given, result: scores.append(result.detach()))
    model(**inputs)
    handle.remove()
    return scores


# The trunk.


@pytest.mark.parametrize("size", ["224x224", "96x96", "224x160", "112x448"])
def test_a_converted_dino_vit_gives_the_original_tokens_at_every_size(goldens, size):
    weights, case = (read_case(goldens / f"01_dino_vit_{name}.safetensors") for name in ("weights", size))
    vit = original_vit(weights.state, weights.meta["args"])
    use_dino_interpolation(vit)
    with torch.no_grad():
        tokens = vit(case.input["x"], interpolate_pos_encoding=True).last_hidden_state
    assert_close(tokens, case.output["tokens"], **OUTPUT)
    assert_close(tokens[:, 0], case.output["cls"], **OUTPUT)


def test_only_away_from_the_design_size_does_dino_interpolation_matter(goldens):
    weights = read_case(goldens / "01_dino_vit_weights.safetensors")
    vit = original_vit(weights.state, weights.meta["args"])
    deviation = {}
    for size in ("224x224", "96x96"):
        case = read_case(goldens / f"01_dino_vit_{size}.safetensors")
        with torch.no_grad():
            cls = vit(case.input["x"], interpolate_pos_encoding=True).last_hidden_state[:, 0]
        deviation[size] = (cls - case.output["cls"]).abs().max()
    assert deviation["224x224"] < 2e-5
    assert deviation["96x96"] > 1e-3


@pytest.mark.parametrize("size", ["96x96", "224x160", "112x448"])
def test_the_position_table_is_interpolated_by_the_rule_of_dino(size):
    case = read_case(FIXTURES / "01_dino_vit_tables.safetensors")
    height, width = (int(edge) // 16 for edge in size.split("x"))
    assert_close(
        dino_position_table(case.state["pos_embed"], (height, width)), case.output[size], atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("case", cases("05_ibot_vit"), indirect=True)
def test_a_converted_ibot_vit_gives_the_original_tokens_with_hidden_patches(case):
    vit = original_vit(case.state, case.meta["args"])
    use_dino_interpolation(vit)
    tokens = vit(case.input["x"], bool_masked_pos=case.input["mask"].flatten(1)).last_hidden_state
    assert_close(tokens, case.output["tokens_masked"], **OUTPUT)
    (tokens * case.input["probe"]).sum().backward()
    mask_token, bias = vit.embeddings.mask_token, vit.embeddings.patch_embeddings.projection.bias
    assert_close(mask_token.grad[0], case.output["grad_masked_embed"], atol=2e-5, rtol=1e-4)
    assert_close(bias.grad, case.output["grad_patch_embed_bias"], atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        local = vit(case.input["x_local"], interpolate_pos_encoding=True).last_hidden_state
    assert_close(local, case.output["tokens_local"], **OUTPUT)


# The head.


DINO_HEADS = [f"02_dino_head_{name}" for name in ("nll_true", "nll_false", "bn", "nlayers1", "nlayers2")]
IBOT_HEADS = [
    f"05_ibot_head_{name}" for name in ("notshared", "notshared_nll_false", "shared", "ln", "bn", "nobottleneck")
]


@pytest.mark.parametrize("case", cases(*DINO_HEADS), indirect=True)
def test_a_converted_dino_head_gives_the_original_scores_and_gradients(case):
    head = original_head(case)
    x = case.input["x"].requires_grad_()
    scores = head.prototypes(head.embed(x))
    assert_close(head.mlp(x), case.output["mlp_out"], **OUTPUT)
    assert_close(scores, case.output["y"], **OUTPUT)
    (scores * case.input["probe"]).sum().backward()
    assert_close(x.grad, case.output["grad_x"], **GRADIENT)
    assert_close(head.last_layer.weight_v.grad, case.output["grad_weight_v"], **GRADIENT)
    assert isinstance(head.last_layer.weight_g, nn.Parameter) == ("grad_weight_g" in case.output)
    if "grad_weight_g" in case.output:
        assert_close(head.last_layer.weight_g.grad, case.output["grad_weight_g"], **GRADIENT)


@pytest.mark.parametrize("case", cases("02_dino_head_bn"), indirect=True)
def test_batch_norm_in_the_head_learns_the_original_statistics(case):
    head = original_head(case).train()
    scores = head.prototypes(head.embed(case.input["x"]))
    assert_close(scores, case.output["y_train_mode"], **OUTPUT)
    statistics = {name: value for name, value in case.output.items() if name.startswith("after_train/")}
    buffers = dict(head.named_buffers())
    assert len(statistics) == 6
    for name, value in statistics.items():
        assert_close(buffers[name.removeprefix("after_train/")], value, **OUTPUT)


@pytest.mark.parametrize("case", cases(*IBOT_HEADS), indirect=True)
def test_a_converted_ibot_head_gives_the_original_scores_of_class_and_patches(case):
    head = original_head(case)
    with torch.no_grad():
        embeddings = head.embed(case.input["tokens"])
        assert_close(head.prototypes(embeddings[:, 0]), case.output["cls"], **OUTPUT)
        assert_close(head.patch_prototypes(embeddings[:, 1:]), case.output["patch"], **OUTPUT)
        assert_close(head.prototypes(head.embed(case.input["vec"])), case.output["cls_from_2d"], **OUTPUT)


# The views.


@pytest.mark.parametrize("case", cases("04_dino_multicrop"), indirect=True)
def test_our_forward_scores_the_views_in_the_order_of_dino(case):
    model = original_student(case)
    crops = [case.input[f"crop_{i}"] for i in range(5)]
    hidden = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    views = {"global_views": torch.stack(crops[:2]), "local_views": torch.stack(crops[2:]), "hidden": hidden}
    cls_scores, patch_scores = scores_of_forward(model, model.student_head.last_layer, **views)
    assert_close(cls_scores, case.output["y"], **OUTPUT)
    assert len(patch_scores) == 0


@pytest.mark.parametrize("case", cases("05_ibot_multicrop"), indirect=True)
def test_our_forward_scores_views_and_hidden_patches_as_ibot_does(case):
    model = original_student(case)
    views = {
        name: torch.stack([case.input[f"{kind}_{i}"] for i in range(2)])
        for name, kind in (("global_views", "global"), ("local_views", "local"), ("hidden", "mask"))
    }
    (cls_scores,) = scores_of_forward(model, model.student_head.last_layer, **views)
    (patch_scores,) = scores_of_forward(model, model.student_head.patch_last_layer, **views)
    assert_close(cls_scores, torch.cat([case.output["cls"], case.output["local_cls"]]), **OUTPUT)
    assert_close(patch_scores, case.output["patch"][views["hidden"].flatten(0, 1).flatten(1)], **OUTPUT)


# The losses.


@pytest.mark.parametrize("case", cases("03_dino_loss"), indirect=True)
def test_loss_centre_and_gradients_follow_dino_over_four_calls(case):
    arguments, batch = case.meta["args"], case.meta["B"]
    center = RunningCenter((1, arguments["out_dim"]), momentum=0.9)
    temperatures = case.output["teacher_temp_schedule"].tolist()
    for call, epoch in enumerate(case.meta["epochs"]):
        student = case.input[f"student_{call}"].requires_grad_()
        teacher = case.input[f"teacher_{call}"]
        probabilities = teacher_probabilities(teacher, center.value, torch.tensor(temperatures[epoch]))
        loss = view_loss(student.view(arguments["ncrops"], batch, -1), probabilities.view(2, batch, -1), 0.1)
        loss.backward()
        center.add(teacher.sum(dim=0), len(teacher))
        center.step()
        assert_close(loss.detach(), case.output["loss"][call], **LOSS)
        assert_close(student.grad, case.output[f"grad_student_{call}"], atol=1e-6, rtol=0)
        assert_close(center.value, case.output[f"center_{call}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", cases("03_dino_loss"), indirect=True)
def test_the_teacher_temperature_warms_up_as_in_dino(case):
    arguments = case.meta["args"]
    for epoch, temperature in enumerate(case.output["teacher_temp_schedule"].tolist()):
        ours = linear_warmup(
            arguments["warmup_teacher_temp"], arguments["teacher_temp"], epoch, arguments["warmup_teacher_temp_epochs"]
        )
        assert ours == pytest.approx(temperature, abs=1e-12)


class IbotCall:
    """The tensors of one call of the original iBOT loss, and our losses of them."""

    def __init__(self, case: Case, call: int, center: RunningCenter, patch_center: RunningCenter):
        arguments, batch = case.meta["args"], case.meta["B"]
        temperature, patch_temperature = (
            torch.tensor(
                linear_warmup(
                    arguments[f"warmup_{name}"],
                    arguments[name],
                    case.meta["epochs"][call],
                    arguments["warmup_teacher_temp_epochs"],
                )
            )
            for name in ("teacher_temp", "teacher_temp2")
        )
        names = ("student_cls", "student_local_cls", "student_patch")
        self.students = {name: case.input[f"{name}_{call}"].clone().requires_grad_() for name in names}
        teacher_cls, teacher_patch = case.input[f"teacher_cls_{call}"], case.input[f"teacher_patch_{call}"]
        self.teacher = teacher_probabilities(teacher_cls, center.value, temperature).view(2, batch, -1)
        hidden = case.input[f"mask_{call}"].flatten(0, 1).flatten(1)  # (V * B, patches)
        teacher_patches = teacher_probabilities(teacher_patch[hidden], patch_center.value[0], patch_temperature)
        self.patch_loss = hidden_patch_loss(self.students["student_patch"][hidden], teacher_patches, hidden, 0.1)
        center.add(teacher_cls.sum(dim=0), len(teacher_cls))
        patch_center.add(teacher_patch.sum(dim=(0, 1)), teacher_patch[..., 0].numel())

    def cls_loss(self, *students: str) -> torch.Tensor:
        scores = torch.cat([self.students[name] for name in students])
        return view_loss(scores.view(-1, *self.teacher.shape[1:]), self.teacher, 0.1)


def ibot_centers(case: Case) -> tuple[RunningCenter, RunningCenter]:
    arguments = case.meta["args"]
    return RunningCenter((1, arguments["out_dim"]), 0.9), RunningCenter((1, 1, arguments["patch_out_dim"]), 0.9)


@pytest.mark.parametrize("case", cases("05_ibot_loss"), indirect=True)
def test_losses_centres_and_gradients_follow_ibot_over_its_calls(case):
    center, patch_center = ibot_centers(case)
    calls = sum(name.startswith("mask_") for name in case.input)
    assert calls >= 2
    for call in range(calls):
        ours = IbotCall(case, call, center, patch_center)
        cls_loss = ours.cls_loss("student_cls", "student_local_cls")
        loss = cls_loss + ours.patch_loss
        loss.backward()
        center.step()
        patch_center.step()
        assert_close(cls_loss.detach(), case.output["cls"][call], **LOSS)
        assert_close(ours.patch_loss.detach(), case.output["patch"][call], **LOSS)
        assert_close(loss.detach(), case.output["loss"][call], **LOSS)
        assert_close(center.value, case.output[f"center_{call}"], **LOSS)
        assert_close(patch_center.value, case.output[f"center2_{call}"], **LOSS)
        for name, scores in ours.students.items():
            assert_close(scores.grad, case.output[f"grad_{name}_{call}"], **LOSS)


@pytest.mark.parametrize("case", cases("05_ibot_loss"), indirect=True)
def test_without_local_views_the_losses_are_those_of_ibot_too(case):
    ours = IbotCall(case, 0, *ibot_centers(case))
    cls_loss = ours.cls_loss("student_cls")
    losses = torch.stack([cls_loss, ours.patch_loss, cls_loss + ours.patch_loss])
    assert_close(losses.detach(), case.output["nolocal"], **LOSS)


@pytest.mark.parametrize("case", cases("05_ibot_loss"), indirect=True)
def test_a_view_without_hidden_patches_is_among_the_cases_of_the_original_loss(case):
    assert not case.input["mask_0"].flatten(2).any(dim=2).all()
