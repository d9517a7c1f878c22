"""Tiny methods, an endless stream of random views, and the loop over them, for the tests of this folder."""

import inspect
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import ViTConfig

from hf_pathology.modeling.configuration_dino import DinoConfig
from hf_pathology.modeling.configuration_dinov2 import Dinov2PreTrainingConfig
from hf_pathology.modeling.configuration_ibot import IbotConfig
from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.modeling_dino import DinoForPreTraining
from hf_pathology.modeling.modeling_dinov2 import Dinov2ForPreTraining
from hf_pathology.modeling.modeling_ibot import IbotForPreTraining
from hf_pathology.modeling.modeling_mae import MaeForPreTraining
from hf_pathology.training.loop import TrainingLoop
from hf_pathology.training.options import TrainingOptions


DECODER = {
    "mask_ratio": 0.3,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
HEAD = {"out_dim": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16}
METHODS = {
    "dino": (DinoForPreTraining, DinoConfig, HEAD),
    "ibot": (IbotForPreTraining, IbotConfig, HEAD),
    "mae": (MaeForPreTraining, MaeConfig, DECODER),
    "dinov2": (  # what decomposes of it: Sinkhorn and the terms that spread features are of a micro-batch
        Dinov2ForPreTraining,
        Dinov2PreTrainingConfig,
        {**HEAD, "patch_out_dim": 64, "centering": "softmax", "spreading": None, "drop_path_subset": False},
    ),
}


def method(name="ibot", **changes) -> torch.nn.Module:
    """The untrained method `name`, always the same, with 0.2 of stochastic depth unless `changes` say otherwise."""
    torch.manual_seed(0)
    kind, config, options = METHODS[name]
    trunk = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    return kind(config(trunk, **{**options, "drop_path_rate": 0.2, **changes}))


class Batches:
    """An endless, resumable stream of random views, each batch made from its number alone.

    Args:
        broken: numbers of batches whose views are not finite.
        on_batch: called with the number of each batch.
    """

    def __init__(self, batch_size=4, broken=(), on_batch=None):
        self.place, self.batch_size, self.broken, self.on_batch = 0, batch_size, broken, on_batch

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.place)
            self.tile = torch.Generator().manual_seed(self.place + 10**6)
            tiles = self.tile.get_state()
            batch = {"global_views": self.views(generator, 2, 32)}
            order = torch.rand(2, self.batch_size, 16, generator=generator).argsort(dim=-1)
            batch["hidden"] = (order < 5).unflatten(-1, (4, 4))  # as many in each view, for MAE
            self.tile.set_state(tiles)  # the local views are of the same tiles
            batch["local_views"] = self.views(generator, 2, 16)
            batch |= {"slide": ["a.svs"] * self.batch_size, "xy": torch.full((self.batch_size, 2), self.place)}
            if self.place in self.broken:
                batch["global_views"].fill_(float("nan"))
            if self.on_batch:
                self.on_batch(self.place)
            self.place += 1
            yield batch

    def views(self, generator, count, size):
        return torch.randn(count, self.batch_size, 3, size, size, generator=generator)

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, states):
        self.place = states[0]["place"]


class Parts(Batches):
    """Batches of eight, each cut into `parts`, of which the parts `mine` are handed out one after the other.

    So that a share of every batch goes to each process, or to each micro-batch of a step.
    """

    def __init__(self, parts, mine, **options):
        super().__init__(8, **options)
        self.parts, self.mine = parts, mine

    def __iter__(self):
        for whole in super().__iter__():
            for part in self.mine:
                rows = slice(part * 8 // self.parts, (part + 1) * 8 // self.parts)
                yield {
                    name: value[rows] if name in ("slide", "xy") else value[:, rows] for name, value in whole.items()
                }


def small_loop(
    out, batches=None, model=None, config=None, mixed_precision="no", hooks=None, accelerator=None, **changes
) -> TrainingLoop:
    """The loop, on one process of the CPU unless `accelerator` is another; `hooks` are its `export` and `judge`."""
    options = {"steps": 6, "batch_size": 4, "learning_rate": 0.05, "warmup_steps": 2, "log_every": 1, **changes}
    options = TrainingOptions(**{"panel_every": 3, "checkpoint_every": 2, "cpu": True, **options})
    if accelerator is None:
        AcceleratorState._reset_state(True)  # the precision of a test before this one
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = model or method()
    wanted = inspect.signature(type(model).forward).parameters
    return TrainingLoop(
        model,
        batches or Batches(),
        lambda batch: {name: value for name, value in batch.items() if name in wanted},
        options,
        accelerator,
        Path(out),
        config or options.deciding(),
        **(hooks or {}),
    )


def assert_same_weights(one, other):
    for (name, first), second in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(first, second), name
