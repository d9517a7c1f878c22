"""The colour of a tile as its features: the baseline that every encoder has to beat."""

import torch


class MeanColour:
    """Six numbers for a tile, used in place of an encoder: mean and standard deviation of red, green and blue."""

    name = "mean colour"
    revision = "1"
    pooling = "none"

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        """Features (B, 6), between 0 and 1, of uint8 `tiles` (B, h, w, 3)."""
        pixels = tiles.flatten(1, 2).float() / 255  # (B, h * w, 3)
        return torch.cat([pixels.mean(dim=1), pixels.std(dim=1)], dim=1)
