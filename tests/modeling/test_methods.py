"""What is true of every method with a student and a teacher: DINO, iBOT and the combined recipe."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel, Dinov2WithRegistersConfig, PretrainedConfig, ResNetConfig, ViTConfig

from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.modeling.configuration_dino import DinoConfig
from hf_pathology.modeling.configuration_dinov2 import Dinov2PreTrainingConfig
from hf_pathology.modeling.configuration_ibot import IbotConfig
from hf_pathology.modeling.drop_path import trunk_layers
from hf_pathology.modeling.modeling_dino import DinoForPreTraining
from hf_pathology.modeling.modeling_dinov2 import Dinov2ForPreTraining
from hf_pathology.modeling.modeling_ibot import IbotForPreTraining
from hf_pathology.modeling.teacher_student import TeacherStudent
from hf_pathology.training.optimizer import make_optimizer, parameter_groups, set_rates


PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
VIT = ViTConfig(**PLAIN, intermediate_size=32, layer_norm_eps=1e-6)
REGISTERS = Dinov2WithRegistersConfig(**PLAIN, num_register_tokens=2, layerscale_value=0.5)
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
HEAD = {"out_dim": 24, "head_hidden_dim": 20, "head_bottleneck_dim": 12}
METHODS = {
    "dino": (DinoForPreTraining, DinoConfig, VIT, {}),
    "dino resnet": (DinoForPreTraining, DinoConfig, RESNET, {"drop_path_rate": 0.0}),
    "ibot": (IbotForPreTraining, IbotConfig, VIT, {}),
    "ibot registers": (IbotForPreTraining, IbotConfig, REGISTERS, {"patch_out_dim": 30}),
    "dinov2": (Dinov2ForPreTraining, Dinov2PreTrainingConfig, REGISTERS, {"patch_out_dim": 30}),
    "dinov2 kde": (Dinov2ForPreTraining, Dinov2PreTrainingConfig, VIT, {"patch_out_dim": 30, "spreading": "kde"}),
    "dinov2 softmax": (
        Dinov2ForPreTraining,
        Dinov2PreTrainingConfig,
        VIT,
        {"patch_out_dim": 30, "centering": "softmax", "spreading": None},
    ),
}
each_method = pytest.mark.parametrize("name", METHODS)
STEPS = 8


def method(name: str, **changes) -> TeacherStudent:
    """A method in training whose teacher and centres are not where they start."""
    kind, config, trunk, options = METHODS[name]
    torch.manual_seed(0)
    model = kind(config(trunk, **{**HEAD, "drop_path_rate": 0.2, **options, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for center in model.centers:
            center.value.normal_(std=0.1)
    return model.train()


def views(model: TeacherStudent, batch: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random views of `batch` tiles; where patches are hidden, one view has none."""
    draw = torch.Generator().manual_seed(seed)
    inputs = {
        "global_views": torch.randn(2, batch, 3, 32, 32, generator=draw),
        "local_views": torch.randn(3, batch, 3, 16, 16, generator=draw),
    }
    if model.hides_patches:
        inputs["hidden"] = torch.rand(2, batch, 4, 4, generator=draw) < 0.4
        inputs["hidden"][0, 0] = False
    return inputs


def train(model: TeacherStudent, steps: int = 3, **rates) -> None:
    """Some optimizer steps in the order of the loop."""
    optimizer = make_optimizer(parameter_groups(model))
    for step in range(steps):
        set_rates(optimizer, rates.get("learning_rate", 0.01), rates.get("weight_decay", 0.1))
        model(**views(model, seed=step)).loss.backward()
        for parameter in model.frozen_parameters(step):
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(step, STEPS)


@each_method
def test_every_trained_weight_gets_a_gradient_and_no_weight_of_the_teacher(name):
    model = method(name)
    model(**views(model)).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        trained = parameter_name.startswith("student")
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None) == trained, parameter_name
        assert not trained or parameter.grad.isfinite().all(), parameter_name


@each_method
def test_the_teacher_is_the_recursive_mean_of_its_students(name):
    model = method(name)
    expected = {key: value.clone() for key, value in model.named_parameters() if key.startswith("teacher")}
    optimizer = make_optimizer(parameter_groups(model))
    for step in range(4):
        set_rates(optimizer, 0.02, 0.1)
        model(**views(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        start = model.config.teacher_momentum
        momentum = 1 + 0.5 * (start - 1) * (1 + math.cos(math.pi * step / STEPS))
        students = dict(model.named_parameters())
        for key, value in expected.items():
            student = students["student" + key.removeprefix("teacher")].detach()
            expected[key] = momentum * value + (1 - momentum) * student
        model.after_step(step, STEPS)
    for key, value in expected.items():
        assert_close(dict(model.named_parameters())[key], value, atol=1e-6, rtol=1e-5, msg=key)


@each_method
def test_frozen_prototypes_neither_move_nor_decay(name):
    model = method(name, freeze_last_layer_steps=2)
    before = {key: value.clone() for key, value in model.named_parameters() if key.startswith("student")}
    train(model, steps=2, weight_decay=10.0)
    for key, value in model.named_parameters():
        if key in before:
            assert torch.equal(value, before[key]) == ("last_layer" in key), key
    train(model, steps=3)
    assert not any(torch.equal(value, before[key]) for key, value in model.named_parameters() if key in before)


@each_method
def test_views_packed_into_one_pass_give_the_same_loss_and_gradients(name):
    if METHODS[name][2] is RESNET:
        model = method(name)
        model.suit(torch.device("cuda"))
        assert not model.packs
        return
    one, other = method(name, drop_path_rate=0.0), method(name, drop_path_rate=0.0)
    one.suit(torch.device("cpu"))
    other.suit(torch.device("cuda"))
    assert other.packs and not one.packs
    losses = []
    for model in (one, other):
        losses.append(model(**views(model)).loss)
        losses[-1].backward()
    assert_close(*losses, atol=1e-5, rtol=1e-5)
    for (key, first), second in zip(one.named_parameters(), other.parameters()):
        if first.grad is not None:
            assert_close(first.grad, second.grad, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler, of itself
@pytest.mark.parametrize("name", ["dino", "ibot registers"])
@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["separate", "packed"])
def test_compiled_layers_give_the_same_loss_and_gradients(name, device):
    eager = method(name, drop_path_rate=0.0)
    eager.suit(torch.device(device))
    compiled = copy.deepcopy(eager)
    for trunk in compiled.trunks:
        for layer in trunk_layers(trunk):
            layer.compile(dynamic=False)
    losses = []
    for model in (eager, compiled):
        losses.append(model(**views(model)).loss)
        losses[-1].backward()
    assert_close(*losses, atol=1e-4, rtol=1e-4)
    for (key, first), second in zip(eager.named_parameters(), compiled.parameters()):
        if first.grad is not None:
            assert_close(first.grad, second.grad, atol=1e-4, rtol=1e-3, msg=key)


@each_method
def test_under_bfloat16_autocast_the_loss_is_near_that_of_float32(name):
    model = method(name, drop_path_rate=0.0)
    exact = model(**views(model)).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**views(model)).loss
    assert rounded.dtype == torch.float32
    assert_close(rounded, exact, atol=1e-2, rtol=1e-2)


@each_method
def test_a_saved_method_loads_whole_and_goes_on_alike(name, tmp_path):
    model = method(name)
    train(model)
    model.save_pretrained(tmp_path)
    loaded, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert loaded.config.encoder_config.to_dict()["model_type"] == METHODS[name][2].model_type
    model.eval(), loaded.eval()
    assert torch.equal(loaded(**views(model)).loss, model(**views(model)).loss)


@each_method
def test_the_encoder_is_released_and_starts_student_and_teacher_of_another_run(name, tmp_path):
    model = method(name)
    train(model)
    export_encoder(model.encoder, tmp_path / "encoder", tile_size=32, mpp=0.5)
    kind, config, _, options = METHODS[name]
    started = kind.from_encoder(str(tmp_path / "encoder"), config(None, **{**HEAD, "drop_path_rate": 0.0, **options}))
    for trunk in started.trunks:
        own = trunk.state_dict()
        for key, value in model.teacher.state_dict().items():
            assert torch.equal(own[key], value), key
    train(started, steps=1)


@each_method
def test_the_panel_says_finite_numbers_of_the_last_batch(name):
    model = method(name)
    train(model, steps=1)
    panel = model.collapse_panel()
    assert all(math.isfinite(value) for value in panel.values())
    assert 0 < panel["teacher_entropy"] <= panel["uniform_entropy"] + 1e-5
    assert panel["kl"] > 0 and 0 < panel["prototype_usage"] <= 1
    assert len([key for key in panel if key.endswith("center_norm")]) == len(model.centers)


@each_method
def test_depths_are_known_for_every_trained_weight(name):
    model = method(name)
    depths = model.depths()
    assert set(depths) == {key for key, value in model.named_parameters() if value.requires_grad}
    top = max(depths.values())
    assert all(depth == top for key, depth in depths.items() if "head" in key)
    assert min(depths.values()) == 0


def test_the_batch_norms_of_a_teacher_keep_statistics_of_their_own():
    model = method("dino resnet")
    norms = [module for module in model.teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [module.running_mean.clone() for module in norms]
    model(**views(model))
    assert not any(torch.equal(module.running_mean, value) for module, value in zip(norms, before))
    before = [module.running_mean.clone() for module in norms]
    model.eval()(**views(model))
    assert all(torch.equal(module.running_mean, value) for module, value in zip(norms, before))


def test_a_bfloat16_method_is_refused():
    model = method("dino").to(torch.bfloat16)
    with pytest.raises(TypeError, match="float32"):
        model.after_step(0, STEPS)


@pytest.mark.parametrize("options", [{"centering": "softmin"}, {"spreading": "kneading"}])
def test_unknown_choices_of_the_combined_recipe_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options.values()))):
        Dinov2PreTrainingConfig(VIT, **options)


def naive_dino(model: DinoForPreTraining, inputs: dict[str, torch.Tensor]) -> float:
    """The mean cross-entropy over pairs of a teacher's and another student's view, one tile at a time."""

    def scores(trunk, head, view):
        options = {"interpolate_pos_encoding": True} if trunk.config.model_type == "vit" else {}
        output = trunk(view[None], **options)
        image = output.last_hidden_state[:, 0] if options else output.pooler_output.flatten(1)
        return head.prototypes(head.embed(image))[0]

    terms = []
    for tile in range(inputs["global_views"].shape[1]):
        globals_, locals_ = inputs["global_views"][:, tile], inputs["local_views"][:, tile]
        targets = [
            (
                (scores(model.teacher, model.teacher_head, view) - model.center.value[0]) / model.teacher_temperature
            ).softmax(dim=0)
            for view in globals_
        ]
        students = [scores(model.student, model.student_head, view) for view in (*globals_, *locals_)]
        for i, target in enumerate(targets):
            for j, student in enumerate(students):
                if i != j:
                    terms.append(-(target * (student / 0.1).log_softmax(dim=0)).sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", ["dino", "dino resnet"])
@torch.no_grad()
def test_the_loss_of_dino_equals_a_naive_loop_over_tiles_and_pairs_of_views(name):
    model = method(name, drop_path_rate=0.0).eval()
    assert_close(model(**views(model)).loss, naive_dino(model, views(model)), atol=1e-5, rtol=1e-5)


def test_two_micro_batches_are_one_batch_where_the_loss_decomposes():
    for name in ("dino", "ibot registers"):
        whole, halves = method(name, drop_path_rate=0.0), method(name, drop_path_rate=0.0)
        inputs = views(whole, batch=6)
        whole(**inputs).loss.backward()
        for part in (slice(0, 3), slice(3, 6)):
            (halves(**{key: value[:, part] for key, value in inputs.items()}).loss / 2).backward()
        for (key, one), two in zip(whole.named_parameters(), halves.parameters()):
            if one.grad is not None:
                assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-4, msg=key)
        whole.after_step(0, STEPS), halves.after_step(0, STEPS)
        for one, two in zip(whole.centers, halves.centers):
            assert_close(one.value, two.value, atol=1e-6, rtol=1e-5)


def config_of(name: str) -> PretrainedConfig:
    return METHODS[name][1](METHODS[name][2])


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
def test_a_configuration_survives_its_json(name, tmp_path):
    config_of(name).save_pretrained(tmp_path)
    again = METHODS[name][1].from_pretrained(tmp_path)
    assert again.encoder_config.to_dict() == config_of(name).encoder_config.to_dict()
    assert type(again.encoder_config) is type(config_of(name).encoder_config)
