"""What the class token of a plain transformer looks at in the last layer, whichever way its attention is computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .drop_path import trunk_layers


class ClsAttention:
    """Takes note of the last layer's attention of the class token: `rows` (B, heads, tokens) after each forward pass.

    A softmax in float32 over all tokens, the class token itself and masked ones among them.
    """

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None

    def look(self, attention: nn.Module, inputs: tuple, options: dict) -> None:
        states = inputs[0]  # (B, tokens, D)
        mask = inputs[1] if len(inputs) > 1 else options.get("attention_mask")  # additive, (B, 1, 1, tokens)
        query, key = (
            project(part).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, heads, tokens, size)
            for project, part in ((attention.q_proj, states[:, :1]), (attention.k_proj, states))
        )
        scores = (query.float() @ key.float().transpose(2, 3)) * attention.scaling
        if mask is not None:
            scores = scores + mask
        self.rows = scores.softmax(dim=-1)[:, :, 0]


@contextmanager
def watch_cls_attention(trunk: nn.Module) -> Iterator[ClsAttention]:
    """Within the block, each pass through `trunk`, a ViT or what is made of its layers, is noted."""
    noted = ClsAttention()
    hook = trunk_layers(trunk)[-1].attention.register_forward_pre_hook(noted.look, with_kwargs=True)
    try:
        yield noted
    finally:
        hook.remove()
