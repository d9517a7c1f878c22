"""What `pretrain.py` measures: methods at their sizes with their views, a step of ours, one of the plain way, their FLOPs."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from plain_pretraining import PlainDino, PlainIbot, PlainStep, PlainViews, take_weights
from transformers import PreTrainedModel, ViTConfig

from hf_pathology.modeling.configuration_dino import DinoConfig
from hf_pathology.modeling.configuration_dinov2 import Dinov2PreTrainingConfig
from hf_pathology.modeling.configuration_ibot import IbotConfig
from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.drop_path import trunk_layers
from hf_pathology.modeling.modeling_dino import DinoForPreTraining
from hf_pathology.modeling.modeling_dinov2 import Dinov2ForPreTraining
from hf_pathology.modeling.modeling_ibot import IbotForPreTraining
from hf_pathology.modeling.modeling_mae import MaeForPreTraining
from hf_pathology.tiles.hidden import HiddenOptions, HiddenPatches
from hf_pathology.tiles.views import MultiCrop, ViewOptions
from hf_pathology.training.clipping import clip_gradients, tensor_norms
from hf_pathology.training.optimizer import make_optimizer, parameter_groups, set_rates


METHODS: dict[str, tuple[type, type, type | None]] = {  # ours, its configuration, the plain way
    "dino": (DinoForPreTraining, DinoConfig, PlainDino),
    "ibot": (IbotForPreTraining, IbotConfig, PlainIbot),
    "dinov2": (Dinov2ForPreTraining, Dinov2PreTrainingConfig, None),
    "mae": (MaeForPreTraining, MaeConfig, None),
}
SIZES = {  # width, depth, heads
    "tiny": (32, 2, 2),
    "small": (192, 6, 3),
    "vit-s": (384, 12, 6),
    "vit-b": (768, 12, 12),
    "vit-l": (1024, 24, 16),
}
PATCH = 16
RATE, DECAY, CLIP, MOMENTUM = 1e-5, 0.04, 3.0, 0.996  # of both ways; the momentum is that of the first step
STEPS = 10**6  # of the schedules, which do not move while it is measured


@dataclass(frozen=True)
class Setup:
    """A method at a size, with its views.

    Attributes:
        tile_size: edge in pixels of what views are made of.
        head: `out_dim` and other options of the method's configuration.
    """

    method: str
    size: str
    batch_size: int
    views: ViewOptions
    tile_size: int
    head: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method}, {self.size}, batch {self.batch_size}"

    @property
    def hidden(self) -> HiddenOptions | None:
        if self.method == "mae":
            return HiddenOptions(hidden_shares=[0.75], hidden_spreads=[0.0], hidden_shape="random")
        return None if self.method == "dino" else HiddenOptions()

    def multi_crop(self) -> MultiCrop:
        edge = self.views.global_size // PATCH
        return MultiCrop(self.views, 0, self.hidden and HiddenPatches(self.hidden, edge, edge))

    def plain_views(self) -> PlainViews:
        return PlainViews(self.views, self.hidden, PATCH)


def published(method: str, size: str, batch_size: int) -> Setup:
    """The set-up of the method's paper."""
    no_colours = {"jitter": [0.0] * 4, "gray": 0.0, "blur": [0.0] * 3, "solarize": 0.0}
    views = {
        "dino": ViewOptions(local_views=8, global_scale=[0.4, 1.0], local_scale=[0.05, 0.4]),
        "ibot": ViewOptions(),
        "dinov2": ViewOptions(local_views=8, global_scale=[0.32, 1.0], local_scale=[0.05, 0.32]),
        "mae": ViewOptions(global_views=1, local_views=0, global_scale=[0.2, 1.0], **no_colours),
    }[method]
    return Setup(method, size, batch_size, views, tile_size=256)


def small(method: str, size: str = "small", batch_size: int = 64) -> Setup:
    """The set-up of the learning experiment."""
    views = copy.deepcopy(published(method, size, batch_size).views)
    views.global_size, views.local_size, views.local_views = 96, 48, 4 * bool(views.local_views)
    head = {"dinov2": {"out_dim": 2048, "patch_out_dim": 2048}, "mae": {}}.get(method, {"out_dim": 2048})
    return Setup(method, size, batch_size, views, tile_size=224, head=head)


def our_model(setup: Setup, device: torch.device) -> PreTrainedModel:
    """The method, untrained, always with the same weights."""
    width, depth, heads = SIZES[setup.size]
    vit = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=setup.views.global_size,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
    )
    method, config, _ = METHODS[setup.method]
    momentum = {} if setup.method == "mae" else {"teacher_momentum": MOMENTUM}
    torch.manual_seed(0)
    model = method(config(vit, **momentum, **setup.head)).to(device)
    model.suit(device)
    return model.train()


def computed(model: PreTrainedModel, attention: str | None = None, compile: bool = False) -> PreTrainedModel:
    """The model, computed in another way: with this attention for each size of view by itself, or with compiled layers."""
    if attention:
        model.packs = False
        for trunk in model.trunks:
            trunk.set_attn_implementation(attention)
    for trunk in model.trunks if compile else []:
        for layer in trunk_layers(trunk):
            layer.compile(dynamic=False)
    return model


class OurStep:
    """One optimizer step as `TrainingLoop` takes it on one process; `precision` is fp32 or bf16, by autocast."""

    def __init__(self, method: PreTrainedModel, precision: str):
        self.method, self.bf16, self.steps = method, precision == "bf16", 0
        self.trained = {name: weight for name, weight in method.named_parameters() if weight.requires_grad}
        self.optimizer = make_optimizer(parameter_groups(method))

    def __call__(self, **inputs: torch.Tensor) -> float:
        """The loss, after which the weights have moved."""
        set_rates(self.optimizer, RATE, DECAY)
        loss = self.forward(**inputs)
        self.backward(loss)
        value = self.clip_gradients(loss)
        self.optimize()
        self.follow()
        return value

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.method.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            return self.method(**inputs).loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_gradients(self, loss: torch.Tensor) -> float:
        """The loss, which is fetched from the device together with the norms."""
        gradients = {name: weight.grad for name, weight in self.trained.items() if weight.grad is not None}
        norms = tensor_norms(list(gradients.values()))
        value, *norms = torch.cat([loss.detach().view(1), norms]).tolist()
        clip_gradients(gradients, norms, CLIP)
        return value

    def optimize(self) -> None:
        for parameter in self.method.frozen_parameters(self.steps):
            parameter.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()

    def follow(self) -> None:
        self.method.after_step(self.steps, STEPS)
        self.steps += 1


def plain_step(setup: Setup, precision: str, device: torch.device) -> PlainStep:
    """A step of the plain way, from the weights of ours."""
    model = our_model(setup, device)
    plain = METHODS[setup.method][2](model.config).to(device)
    take_weights(plain, model)
    return PlainStep(plain, precision, rate=RATE, decay=DECAY, clip=CLIP, momentum=MOMENTUM)


def plain_inputs(inputs: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The inputs of ours as the plain way takes them: a list of views, and what is hidden in each global one."""
    views = [*inputs["global_views"], *inputs.get("local_views", [])]
    return views, list(inputs.get("hidden", []))


@dataclass(frozen=True)
class Way:
    """A way to take a step; `make(inputs)` gives what takes it, again and again with the same inputs."""

    name: str
    precision: str
    make: Callable[[dict[str, torch.Tensor]], Callable[[], float]]
    compiled: bool = False

    @property
    def is_plain(self) -> bool:
        return self.name.startswith("plain")


def ways(setup: Setup, precisions: list[str], plain_precisions: list[str], device: torch.device) -> list[Way]:
    """The plain way, if the method has one here, then ours; on a GPU also ours without what makes it fast there."""

    def plain(precision: str, inputs: dict[str, torch.Tensor]) -> Callable[[], float]:
        return partial(plain_step(setup, precision, device), *plain_inputs(inputs))

    def ours(precision: str, how: dict[str, Any], inputs: dict[str, torch.Tensor]) -> Callable[[], float]:
        return partial(OurStep(computed(our_model(setup, device), **how), precision), **inputs)

    variants: dict[str, dict[str, Any]] = {"ours": {}}
    if device.type == "cuda":
        variants = {"ours": {"compile": True}, "ours, not compiled": {}}
        if setup.method != "mae":
            variants["ours, size by size"] = {"attention": "sdpa", "compile": True}
        variants["ours, size by size, explicit attention"] = {"attention": "eager", "compile": True}
    found = [
        Way(f"plain, {each}", each, partial(plain, each)) for each in plain_precisions if METHODS[setup.method][2]
    ]
    for each in precisions:
        for name, how in variants.items():
            found.append(Way(f"{name}, {each}", each, partial(ours, each, how), how.get("compile", False)))
    return found


def formula_flops(setup: Setup, hidden: float, every_patch: bool) -> float:
    """FLOPs of a training image: a backward pass is two forward ones, and the teacher, which has none, sees global views.

    Args:
        hidden: hidden patches of an image, in all its global views together.
        every_patch: the head sees all patches of the global views, and not only those that are hidden. Of iBOT's teacher it
            embeds all of them anyway, for the centre.
    """
    width, depth, _ = SIZES[setup.size]
    views, config = setup.views, METHODS[setup.method][1](None, **setup.head)
    patches, local_patches = (views.global_size // PATCH) ** 2, (views.local_size // PATCH) ** 2
    pixels = 3 * PATCH**2
    if setup.method == "mae":
        seen, inner = patches - round(hidden), config.decoder_hidden_size
        encoder = 2 * patches * pixels * width + layers_flops(depth, width, seen + 1)
        decoder = layers_flops(config.decoder_num_hidden_layers, inner, patches + 1)
        return 3 * (encoder + decoder + 2 * inner * ((seen + 1) * width + patches * pixels))
    n_global, n_local = views.global_views, views.local_views
    large = 2 * patches * pixels * width + layers_flops(depth, width, patches + 1)
    little = 2 * local_patches * pixels * width + layers_flops(depth, width, local_patches + 1)
    trunks = (3 + 1) * n_global * large + 3 * n_local * little
    inner, bottleneck = config.head_hidden_dim, config.head_bottleneck_dim
    embed = 2 * (width * inner + inner**2 + inner * bottleneck)  # of a token
    score = 2 * bottleneck * config.out_dim
    heads = (3 * (n_global + n_local) + n_global) * (embed + score)
    if setup.method == "dino":
        return trunks + heads
    patch_score = 2 * bottleneck * (config.patch_out_dim or config.out_dim)
    scored = n_global * patches if every_patch else hidden
    taught = n_global * patches if every_patch or setup.method == "ibot" else hidden
    return trunks + heads + scored * (3 * embed + 4 * patch_score) + taught * embed


def layers_flops(depth: int, width: int, tokens: int) -> float:
    """FLOPs of one forward pass of `tokens` through `depth` transformer layers."""
    return depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
