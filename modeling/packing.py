"""Views of several sizes in one pass through a plain transformer: their tokens follow each other in one long row.

Everything but attention treats tokens one by one, so the linear maps see one large matrix instead of a small one for each
size; attention stays within a view. Made of the trunk's own layers (the idea: DINOv3, arXiv 2508.10104, and sequence
packing in DINOv2, arXiv 2304.07193).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from .drop_path import BatchSubset, DropPath, trunk_layers
from .trunk import split_tokens


PACKED = "packed_views"  # the name of the attention below


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[tuple[int, int]] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention within each view; see `transformers.AttentionInterface`.

    Args:
        query, key, value: (1, heads, tokens of all views, head size); or (views, heads, tokens, head size) without
            `segments`.
        segments: (views, tokens of each), in the order of the row.
    """
    if not segments:
        attended = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
        return attended.transpose(1, 2).contiguous(), None
    lengths = [views * tokens for views, tokens in segments]
    parts = []
    for (views, _), *projected in zip(segments, *(each[0].split(lengths, dim=1) for each in (query, key, value))):
        q, k, v = (
            each.unflatten(1, (views, -1)).transpose(0, 1) for each in projected
        )  # (views, heads, tokens, size)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        parts.append(attended.transpose(1, 2).flatten(0, 1))  # (views * tokens, heads, size)
    return torch.cat(parts)[None], None


AttentionInterface.register(PACKED, packed_attention)


def can_pack(trunk: PreTrainedModel) -> bool:
    """Whether `trunk` is a plain transformer whose layers can be given one long row of tokens."""
    return trunk.config.model_type in ("vit", "dinov2", "dinov2_with_registers", "hipt_region")


def packed_tokens(
    trunk: PreTrainedModel, groups: Sequence[tuple[torch.Tensor, torch.Tensor | None]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What `trunk_tokens` gives for each of the `groups`, by one pass; the trunk's attention must be `PACKED`.

    Args:
        groups: of views of one size each: pixels (B, 3, H, W) and the hidden patches, bool (B, patches), or None.
    """
    options = {"interpolate_pos_encoding": True} if trunk.config.model_type in ("vit", "hipt_region") else {}
    embedded = [trunk.embeddings(pixels, bool_masked_pos=hidden, **options) for pixels, hidden in groups]
    segments = tuple((tokens.shape[0], tokens.shape[1]) for tokens in embedded)
    drop_paths = [module for module in trunk.modules() if isinstance(module, DropPath | BatchSubset)]
    row = torch.cat([tokens.flatten(0, 1) for tokens in embedded])[None]  # (1, tokens of all views, D)
    for drop_path in drop_paths:
        drop_path.segments = segments
    for layer in trunk_layers(trunk):
        row = layer(row, None, segments=segments)
    for drop_path in drop_paths:
        drop_path.segments = ()
    row = trunk.layernorm(row)[0]
    parts = row.split([views * tokens for views, tokens in segments])
    return [split_tokens(trunk, part.unflatten(0, (views, tokens))) for part, (views, tokens) in zip(parts, segments)]
