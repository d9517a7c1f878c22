"""The tiny MAE of the tests, its views and a step of it."""

import torch

from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.modeling_mae import MaeForPreTraining


EDGE = 5  # patches along a view
TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8 * EDGE,
    "patch_size": 8,
}
TINY_DECODER = {
    "decoder_hidden_size": 12,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 20,
}
HIDDEN = 19  # of 25 patches: 6 stay, the whole part of a quarter


def tiny_config(**options) -> MaeConfig:
    return MaeConfig(TINY_VIT, **{**TINY_DECODER, **options})


def tiny_model(**options) -> MaeForPreTraining:
    """A model in training mode whose weights are not where they start."""
    torch.manual_seed(0)
    model = MaeForPreTraining(tiny_config(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def views(batch: int = 3, views: int = 1, hidden: int = HIDDEN, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random views of `batch` tiles, of each of which `hidden` patches are hidden."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(views, batch, EDGE * EDGE, generator=generator).argsort(dim=2).argsort(dim=2)
    return {
        "global_views": torch.randn(views, batch, 3, 8 * EDGE, 8 * EDGE, generator=generator),
        "hidden": (ranks < hidden).view(views, batch, EDGE, EDGE),
    }


def part(inputs: dict[str, torch.Tensor], tiles: slice) -> dict[str, torch.Tensor]:
    return {name: value[:, tiles] for name, value in inputs.items()}


def take_step(model: MaeForPreTraining, optimizer: torch.optim.Optimizer, **inputs: torch.Tensor) -> float:
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.after_step(0, 1)
    return float(loss.detach())
