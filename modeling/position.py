"""DINO's way to interpolate position tables, for checkpoints that were trained with it.

The original codes of DINO, iBOT and HIPT pass `scale_factor=(n + 0.1) / n0` to the interpolation and so sample at a
slightly different step than transformers, which passes the size. Models that we train use transformers' rule; this one
serves converters and the continuation of original checkpoints.
"""

import torch
from torch import nn
from transformers import ViTModel


def dino_position_table(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The position table (1, 1 + h*w, D) for a `grid` of (h, w) patches, from a square `table` (1, 1 + n*n, D)."""
    side = round((table.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return table
    patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    scale = tuple((edge + 0.1) / side for edge in grid)
    patches = nn.functional.interpolate(patches, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def use_dino_interpolation(vit: ViTModel) -> None:
    """Makes this one `vit` interpolate its position table by DINO's rule; nothing about it is saved."""
    embeddings = vit.embeddings

    def interpolate_pos_encoding(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        grid = (height // embeddings.patch_size, width // embeddings.patch_size)
        return dino_position_table(embeddings.position_embeddings, grid)

    embeddings.interpolate_pos_encoding = interpolate_pos_encoding
