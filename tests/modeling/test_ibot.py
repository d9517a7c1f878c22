"""iBOT on a tiny model: its loss against naive loops, what moves and what must not, saving, loading, two processes."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel, ResNetConfig, ViTConfig, ViTMAEConfig, ViTModel

import hf_pathology  # noqa: F401
from hf_pathology.modeling.configuration_ibot import IbotConfig
from hf_pathology.modeling.drop_path import DropPath, add_drop_path
from hf_pathology.modeling.modeling_ibot import IbotForPreTraining
from hf_pathology.modeling.self_distillation import hidden_patch_loss, move_teacher
from hf_pathology.training.optimizer import parameter_groups, set_rates


TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
TOTAL_STEPS = 10


def tiny_config(**options) -> IbotConfig:
    return IbotConfig(TINY_VIT, **{"out_dim": 24, "head_hidden_dim": 20, "head_bottleneck_dim": 12, **options})


def tiny_model(**options) -> IbotForPreTraining:
    """A model in training mode whose teacher and centres are not where they start."""
    torch.manual_seed(0)
    model = IbotForPreTraining(tiny_config(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.center.value.normal_(std=0.1)
        model.patch_center.value.normal_(std=0.1)
    return model.train()


def views(batch: int = 3, globals_: int = 2, locals_: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random views of `batch` tiles; one global view has no hidden patch."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(globals_, batch, 4, 4, generator=generator) < 0.4
    hidden[0, 0] = False
    return {
        "global_views": torch.randn(globals_, batch, 3, 32, 32, generator=generator),
        "local_views": torch.randn(locals_, batch, 3, 16, 16, generator=generator),
        "hidden": hidden,
    }


def part(inputs: dict[str, torch.Tensor], tiles: slice) -> dict[str, torch.Tensor]:
    return {name: value[:, tiles] for name, value in inputs.items()}


def take_step(model: IbotForPreTraining, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One optimizer step in the order of the training loop."""
    model(**views(seed=step)).loss.backward()
    for parameter in model.frozen_parameters(step):
        parameter.grad = None
    optimizer.step()
    optimizer.zero_grad()
    model.after_step(step, TOTAL_STEPS)


def optimizer_of(model: IbotForPreTraining) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameter_groups(model))
    set_rates(optimizer, learning_rate=0.01, weight_decay=0.4)
    return optimizer


def naive_forward(model: IbotForPreTraining, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, list, list]:
    """Both losses, and the teacher's scores of all class tokens and of all patches, view by view and image by image."""
    config = model.config
    hidden = inputs["hidden"].flatten(2)
    teacher_cls, teacher_patches, student_cls, student_patches = [], [], [], []
    for view in inputs["global_views"]:
        tokens = model.teacher_head.embed(model.teacher(view).last_hidden_state)
        teacher_cls.append(model.teacher_head.prototypes(tokens[:, 0]))
        teacher_patches.append(model.teacher_head.patch_prototypes(tokens[:, 1:]))
    for view, mask in zip(inputs["global_views"], hidden):
        tokens = model.student_head.embed(model.student(view, bool_masked_pos=mask).last_hidden_state)
        student_cls.append(model.student_head.prototypes(tokens[:, 0]))
        student_patches.append(model.student_head.patch_prototypes(tokens[:, 1:]))
    for view in inputs["local_views"]:
        tokens = model.student_head.embed(model.student(view, interpolate_pos_encoding=True).last_hidden_state)
        student_cls.append(model.student_head.prototypes(tokens[:, 0]))

    cls_losses, patch_losses = [], []
    for i, teacher in enumerate(teacher_cls):
        target = F.softmax((teacher - model.center.value) / model.teacher_temperature, dim=-1).detach()
        for j, student in enumerate(student_cls):
            if i != j:
                cls_losses.append(F.cross_entropy(student / config.student_temperature, target))
    for teacher, student, masks in zip(teacher_patches, student_patches, hidden):
        target = F.softmax((teacher - model.patch_center.value) / model.teacher_patch_temperature, dim=-1).detach()
        for image in range(len(masks)):
            total = 0.0
            for patch, is_hidden in enumerate(masks[image].float()):
                log_probabilities = F.log_softmax(student[image, patch] / config.student_temperature, dim=-1)
                total = total - is_hidden * (target[image, patch] * log_probabilities).sum()
            patch_losses.append(total / max(1, int(masks[image].sum())))
    return sum(cls_losses) / len(cls_losses), sum(patch_losses) / len(patch_losses), teacher_cls, teacher_patches


# The loss.

KINDS = {
    "shared": {},
    "own patch prototypes": {"patch_out_dim": 18},
    "weighted, learned norms": {"unit_norm": False, "cls_loss_weight": 0.5, "patch_loss_weight": 2.0},
    "no bottleneck": {"head_bottleneck_dim": 0, "patch_out_dim": 18},
    "layer norm": {"head_norm": "ln"},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("globals_", "locals_"), [(2, 2), (2, 0), (3, 1)])
def test_forward_equals_a_naive_loop_over_views_images_and_patches(options, globals_, locals_):
    model = tiny_model(drop_path_rate=0.0, **options)
    inputs = views(globals_=globals_, locals_=locals_)
    output = model(**inputs)
    cls_loss, patch_loss, _, _ = naive_forward(model, inputs)
    loss = model.config.cls_loss_weight * cls_loss + model.config.patch_loss_weight * patch_loss
    assert_close(output.cls_loss, cls_loss.detach())
    assert_close(output.patch_loss, patch_loss.detach())
    assert_close(output.loss, loss)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, naive = (torch.autograd.grad(value, learning) for value in (output.loss, loss))
    assert_close(ours, naive, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_centres_move_to_the_mean_score_of_all_class_tokens_and_all_patches(options):
    model = tiny_model(**options)
    inputs = views()
    _, _, teacher_cls, teacher_patches = naive_forward(model, inputs)
    expected = 0.9 * model.center.value + 0.1 * torch.cat(teacher_cls).mean(dim=0)
    expected_patch = 0.9 * model.patch_center.value + 0.1 * torch.cat(teacher_patches).mean(dim=(0, 1))
    model(**inputs)
    model.after_step(0, TOTAL_STEPS)
    assert_close(model.center.value, expected)
    assert_close(model.patch_center.value, expected_patch)


def test_two_micro_batches_move_the_centres_as_one_large_batch_does():
    model, inputs = tiny_model(), views(batch=4)
    other = copy.deepcopy(model)
    model(**inputs)
    for tiles in (slice(0, 2), slice(2, 4)):
        other(**part(inputs, tiles))
    for each in (model, other):
        each.after_step(0, TOTAL_STEPS)
    assert_close(other.center.value, model.center.value)
    assert_close(other.patch_center.value, model.patch_center.value)


def test_the_loss_of_a_micro_batch_does_not_depend_on_what_was_added_to_the_centre_before():
    model, inputs = tiny_model(drop_path_rate=0.0), views()
    assert_close(model(**inputs).loss, model(**inputs).loss, atol=0, rtol=0)


def test_images_without_hidden_patches_dilute_the_patch_loss():
    generator = torch.Generator().manual_seed(0)
    scores, teacher = torch.randn(3, 5, generator=generator), torch.rand(3, 5, generator=generator).softmax(dim=-1)
    hidden = torch.tensor([[True, True, True, False]])
    alone = hidden_patch_loss(scores, teacher, hidden, 0.1)
    diluted = hidden_patch_loss(scores, teacher, torch.cat([hidden, torch.zeros_like(hidden)]), 0.1)
    assert_close(diluted, alone / 2)


def test_a_batch_without_any_hidden_patch_has_no_patch_loss_and_whole_gradients():
    model, inputs = tiny_model(patch_out_dim=18), views()
    output = model(**{**inputs, "hidden": torch.zeros_like(inputs["hidden"])})
    output.loss.backward()
    assert output.patch_loss == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_at_the_start_each_loss_is_near_the_logarithm_of_the_number_of_prototypes():
    torch.manual_seed(0)
    model = IbotForPreTraining(tiny_config(out_dim=4096, head_hidden_dim=256, head_bottleneck_dim=256)).train()
    inputs = views(batch=4)
    model(**inputs)
    model.center.momentum = model.patch_center.momentum = 0.0
    model.after_step(0, TOTAL_STEPS)  # the centres stand where they will settle
    output = model(**inputs)
    some_hidden = inputs["hidden"].flatten(2).any(dim=2).float().mean()
    assert float(output.cls_loss) == pytest.approx(math.log(4096), rel=0.05)
    assert float(output.patch_loss / some_hidden) == pytest.approx(math.log(4096), rel=0.05)


def test_under_bfloat16_autocast_the_loss_is_near_that_of_float32():
    model, inputs = tiny_model(drop_path_rate=0.0), views()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    assert output.loss.dtype == torch.float32
    assert_close(output.loss, model(**inputs).loss, atol=0, rtol=2e-2)


# The teacher.


def test_the_teacher_has_no_gradient_after_train():
    model = tiny_model()
    model(**views()).loss.backward()
    teacher = [*model.teacher.parameters(), *model.teacher_head.parameters()]
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher)
    student = {**dict(model.student.named_parameters()), **dict(model.student_head.named_parameters())}
    assert [name for name, parameter in student.items() if parameter.grad is None] == []


def test_a_new_teacher_equals_its_student():
    model = IbotForPreTraining(tiny_config())
    student = {**model.student.state_dict(), **model.student_head.state_dict()}
    for name, value in {**model.teacher.state_dict(), **model.teacher_head.state_dict()}.items():
        assert torch.equal(value, student[name])


def test_the_teacher_is_the_recursive_mean_of_its_students_along_the_cosine():
    model = tiny_model(teacher_momentum=0.9)
    expected = {name: value.clone() for name, value in model.teacher.named_parameters()}
    optimizer = optimizer_of(model)
    for step in range(4):
        take_step(model, optimizer, step)
        momentum = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi * step / TOTAL_STEPS))
        assert model.schedule_values(step, TOTAL_STEPS)["teacher_momentum"] == pytest.approx(momentum, abs=1e-12)
        student = dict(model.student.named_parameters())
        expected = {name: momentum * value + (1 - momentum) * student[name] for name, value in expected.items()}
    for name, value in model.teacher.named_parameters():
        assert_close(value, expected[name].detach(), atol=1e-6, rtol=1e-5)


def test_the_teacher_temperatures_rise_along_a_line_and_stay():
    model = tiny_model(
        teacher_temperature_warmup_steps=4, teacher_temperature=0.07, warmup_teacher_patch_temperature=0.05
    )
    expected = {
        "teacher_temperature": [0.04, 0.05, 0.06, 0.07, 0.07, 0.07],
        "teacher_patch_temperature": [0.05, 0.05 + 0.02 / 3, 0.05 + 0.04 / 3, 0.07, 0.07, 0.07],
    }
    for step in range(6):
        scheduled = model.schedule_values(step, TOTAL_STEPS)
        for name, values in expected.items():
            assert float(getattr(model, name)) == pytest.approx(values[step], rel=1e-6)
            assert scheduled[name] == pytest.approx(values[step], rel=1e-6)
        model(**views(batch=1))
        model.after_step(step, TOTAL_STEPS)


def test_a_bfloat16_teacher_is_refused():
    model = tiny_model().to(torch.bfloat16)
    with pytest.raises(TypeError, match="float32"):
        model.after_step(0, TOTAL_STEPS)


def test_a_teacher_parameter_that_the_student_lacks_is_an_error():
    with pytest.raises(KeyError):
        move_teacher([(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))], 0.9)


# The step.


def test_the_frozen_prototypes_neither_move_nor_decay():
    model = tiny_model(freeze_last_layer_steps=2, patch_out_dim=18, unit_norm=False)
    optimizer = optimizer_of(model)
    prototypes = {n: p for n, p in model.student_head.named_parameters() if "last_layer" in n}
    start = {name: parameter.clone() for name, parameter in prototypes.items()}
    assert len(start) == 4
    for step in range(2):
        take_step(model, optimizer, step)
        assert all(torch.equal(start[name], parameter) for name, parameter in prototypes.items())
    take_step(model, optimizer, 2)
    assert not any(torch.equal(start[name], parameter) for name, parameter in prototypes.items())


def test_the_fixed_norms_of_the_prototypes_are_no_parameters():
    model = tiny_model(unit_norm=True)
    assert not any(name.endswith("weight_g") for name, _ in model.named_parameters())
    assert "student_head.last_layer.weight_g" in model.state_dict()


def test_a_discarded_step_leaves_the_centres_where_they_were():
    model = tiny_model()
    center, patch_center = model.center.value.clone(), model.patch_center.value.clone()
    model(**views())
    model.discard_step()
    model.after_step(0, TOTAL_STEPS)
    assert torch.equal(model.center.value, center)
    assert torch.equal(model.patch_center.value, patch_center)


def test_the_collapse_panel_speaks_of_the_last_batch():
    model = tiny_model()
    model(**views(batch=5))
    panel = model.collapse_panel()
    assert panel["uniform_entropy"] == pytest.approx(math.log(24))
    assert 0 < panel["teacher_entropy"] < panel["uniform_entropy"]
    assert 1 < panel["effective_rank"] < 10
    assert 0 <= panel["view_agreement"] <= 1
    assert panel["center_norm"] == pytest.approx(float(model.center.value.norm()))


def center_of_two(rank: int, folder: Path) -> None:
    """One of two processes that each see half of the tiles; saves the centres after the step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    model = tiny_model()
    model(**part(views(batch=4), slice(2 * rank, 2 * rank + 2)))
    model.after_step(0, TOTAL_STEPS)
    torch.save([model.center.value, model.patch_center.value], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_move_the_centres_as_one_does(tmp_path):
    torch.multiprocessing.spawn(center_of_two, (tmp_path,), nprocs=2)
    model = tiny_model()
    model(**views(batch=4))
    model.after_step(0, TOTAL_STEPS)
    for rank in range(2):
        center, patch_center = torch.load(tmp_path / f"{rank}.pt")
        assert_close(center, model.center.value)
        assert_close(patch_center, model.patch_center.value)


# Stochastic depth.


def test_drop_path_drops_whole_samples_at_its_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    rows = DropPath(0.3).train()(torch.ones(10_000, 2, 3)).flatten(1)
    assert torch.equal(rows.amin(dim=1), rows.amax(dim=1))
    assert_close(rows[:, 0].unique(), torch.tensor([0.0, 1 / 0.7]))
    dropped = float((rows[:, 0] == 0).float().mean())
    assert abs(dropped - 0.3) < 3 * math.sqrt(0.3 * 0.7 / 10_000)


def test_drop_path_is_the_identity_in_evaluation():
    branch = torch.randn(4, 3)
    assert DropPath(0.9).eval()(branch) is branch


def test_adding_drop_path_leaves_the_state_dict_as_it_was():
    vit = ViTModel(ViTConfig(**TINY_VIT), add_pooling_layer=False)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    add_drop_path(vit, 0.2)
    assert list(vit.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert [getattr(layer.dropout, "rate", 0.0) for layer in vit.layers] == pytest.approx([0.0, 0.2])


def test_only_the_student_drops_paths_and_only_in_training():
    model, pixels = tiny_model(drop_path_rate=0.5), views()["global_views"][0]
    torch.manual_seed(0)
    draws = [model.student(pixels).last_hidden_state for _ in range(2)]
    assert not torch.equal(*draws)
    assert torch.equal(*(model.teacher(pixels).last_hidden_state for _ in range(2)))
    model.eval()
    assert torch.equal(*(model.student(pixels).last_hidden_state for _ in range(2)))


# Saving and loading.


@pytest.mark.parametrize("options", [*KINDS.values(), {"head_norm": "bn"}], ids=[*KINDS, "batch norm"])
@pytest.mark.parametrize("kind", [IbotForPreTraining, AutoModel])
def test_a_saved_model_loads_whole(tmp_path, options, kind):
    model = tiny_model(drop_path_rate=0.3, teacher_temperature_warmup_steps=5, **options)
    model(**views())
    model.after_step(1, TOTAL_STEPS)
    model.save_pretrained(tmp_path)
    loaded, loading = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    assert isinstance(loaded, IbotForPreTraining)
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    configs = [each.config.to_dict() for each in (loaded, model)]
    for config in configs:
        config["encoder_config"]["dtype"] = config["_name_or_path"] = None
    assert configs[0] == configs[1]
    assert [getattr(layer.dropout, "rate", 0.0) for layer in loaded.student.layers] == pytest.approx([0.0, 0.3])
    model.eval(), loaded.eval()
    assert torch.equal(loaded(**views()).loss, model(**views()).loss)


def test_layer_norm_has_the_epsilon_of_the_paper_unless_told_otherwise():
    assert IbotConfig(TINY_VIT).encoder_config.layer_norm_eps == 1e-6
    assert IbotConfig().encoder_config.layer_norm_eps == 1e-6


@pytest.fixture
def release(tmp_path) -> Path:
    """The directory of an encoder without pooler."""
    torch.manual_seed(7)
    vit = ViTModel(ViTConfig(**TINY_VIT, layer_norm_eps=1e-6), add_pooling_layer=False)
    vit.save_pretrained(tmp_path / "release")
    return tmp_path / "release"


def test_student_and_teacher_start_from_a_released_encoder(release):
    released = ViTModel.from_pretrained(release, add_pooling_layer=False)
    model = IbotForPreTraining.from_encoder(str(release), tiny_config())
    assert_close(dict(model.teacher.state_dict()), dict(released.state_dict()), atol=0, rtol=0)
    student = dict(model.student.state_dict())
    assert not student.pop("embeddings.mask_token").any()
    assert_close(student, dict(released.state_dict()), atol=0, rtol=0)
    assert_close(dict(model.student_head.state_dict()), dict(model.teacher_head.state_dict()), atol=0, rtol=0)
    assert model.encoder is model.teacher
    assert model.config.encoder_config.hidden_size == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [(ResNetConfig(), "a resnet cannot hide patches"), (ViTMAEConfig(), "a vit_mae hides patches by itself")],
)
def test_a_release_that_cannot_be_the_trunk_is_refused(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        IbotForPreTraining.from_encoder(str(tmp_path), tiny_config())


def test_a_release_without_all_its_weights_is_refused(release):
    vit = ViTModel.from_pretrained(release, add_pooling_layer=False)
    weights = {name: value for name, value in vit.state_dict().items() if "layers.1.mlp" not in name}
    vit.save_pretrained(release, state_dict=weights)
    with pytest.raises(ValueError, match="lacks the weights"):
        IbotForPreTraining.from_encoder(str(release), tiny_config())
