"""Colour changes of views, for a whole batch at once, each view by its own numbers, on the device of the batch."""

from collections.abc import Sequence

import torch
from torch import nn

from .views import BLUR, BRIGHTNESS, CONTRAST, GRAY, HUE, ORDER, SATURATION, SOLARIZE


LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision have it
BLUR_RADIUS = 6  # pixels; three of the largest standard deviations


class Photometric(nn.Module):
    """Jitter, grey, blur, solarization and normalisation of views, in the order of DINO's and iBOT's transforms.

    Args:
        mean, std: of the channels, for pixels between 0 and 1.
    """

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, views: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        """Normalised views (V, B, 3, H, W) of uint8 `views` (B, V, H, W, 3) and their `colours` (B, V, COLUMNS)."""
        batch, n_views = views.shape[:2]
        pixels = views.transpose(0, 1).flatten(0, 1).permute(0, 3, 1, 2).float().div_(255).contiguous()
        colours = colours.transpose(0, 1).flatten(0, 1)  # (V * B, COLUMNS)
        for place in range(4):
            for change in (BRIGHTNESS, CONTRAST, SATURATION, HUE):
                here = (colours[:, ORDER][:, place] == change) & (
                    colours[:, change] != (0.0 if change == HUE else 1.0)
                )
                _apply(_jitter, pixels, colours[:, change], here, change)
        _apply(lambda x, _: gray(x).expand_as(x), pixels, colours[:, GRAY], colours[:, GRAY] > 0)
        _apply(blur, pixels, colours[:, BLUR], colours[:, BLUR] > 0)
        _apply(
            lambda x, _: torch.where(x >= 128 / 255, 1 - x, x), pixels, colours[:, SOLARIZE], colours[:, SOLARIZE] > 0
        )
        return ((pixels - self.mean) / self.std).unflatten(0, (n_views, batch))


def _apply(change, pixels: torch.Tensor, amounts: torch.Tensor, here: torch.Tensor, *options) -> None:
    """Replaces the views of `pixels` where `here` by `change(views, amounts, *options)`."""
    chosen = here.nonzero().squeeze(1)
    if len(chosen):
        pixels[chosen] = change(pixels[chosen], amounts[chosen].view(-1, 1, 1, 1), *options)


def _jitter(pixels: torch.Tensor, amount: torch.Tensor, change: int) -> torch.Tensor:
    if change == HUE:
        return turn_hue(pixels, amount)
    if change == BRIGHTNESS:
        other = torch.zeros_like(pixels)
    elif change == CONTRAST:
        other = gray(pixels).mean(dim=(2, 3), keepdim=True)
    else:
        other = gray(pixels)
    return torch.lerp(other.expand_as(pixels), pixels, amount.expand_as(pixels)).clamp_(0, 1)


def gray(pixels: torch.Tensor) -> torch.Tensor:
    """The luma (N, 1, H, W) of `pixels` (N, 3, H, W)."""
    return (pixels * pixels.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)


def turn_hue(pixels: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """`pixels` (N, 3, H, W) with the hue of HSV turned by `turns` (N, 1, 1, 1) of a circle; saturation and value stay."""
    red, green, blue = pixels.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    sixths = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    ) / chroma.clamp(min=1e-8)
    # HSV to RGB without cases: value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (5, 3, 1) + hue, modulo 6.
    circle = sixths / 6 + turns + pixels.new_tensor([5 / 6, 3 / 6, 1 / 6]).view(3, 1, 1)  # (N, 3, H, W)
    k = (circle - circle.floor()).mul_(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def blur(pixels: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Each view of `pixels` (N, 3, H, W) blurred by a Gaussian of its `sigma` (N, 1, 1, 1) pixels; edges are mirrored."""
    height, width = pixels.shape[2:]
    radius = min(BLUR_RADIUS, height - 1, width - 1)
    place = torch.arange(-radius, radius + 1, device=pixels.device, dtype=pixels.dtype)
    taps = torch.exp(-0.5 * (place / sigma) ** 2)  # (N, 1, 1, taps)
    taps = (taps / taps.sum(dim=3, keepdim=True)).split(1, dim=3)
    padded = nn.functional.pad(pixels, (radius,) * 4, mode="reflect")
    rows = sum_of_products(taps, [padded[..., i : i + width] for i in range(len(taps))])
    return sum_of_products(taps, [rows[..., i : i + height, :] for i in range(len(taps))])


def sum_of_products(weights: Sequence[torch.Tensor], terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """weights[0] * terms[0] + weights[1] * terms[1] + ..., without an array for each product."""
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:]):
        total.addcmul_(weight, term)
    return total
