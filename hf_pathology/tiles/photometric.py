"""Colour changes of views, for a whole batch at once, each view by its own numbers, on the device of the batch."""

from collections.abc import Callable, Iterator

import cv2
import torch
from torch import nn

from .views import BLUR, CONTRAST, GRAY, HUE, ORDER, SATURATION, SOLARIZE, STAIN_FACTORS, STAIN_SHIFTS


LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision have it
STAINS = (  # optical density of red, green and blue: Ruifrok and Johnston 2001, Anal Quant Cytol Histol 23:291
    (0.65, 0.70, 0.29),  # haematoxylin
    (0.07, 0.99, 0.11),  # eosin
    (0.27, 0.57, 0.78),  # DAB
)
DARKEST = 1 / 255  # the least light whose optical density is taken
CPU_PIXELS = 2**18  # of views that a CPU changes together: they stay in its cache


class Photometric(nn.Module):
    """Stain jitter, colour jitter, grey, blur, solarization and normalisation of views, in the order of DINO's transforms.

    The stains come first, while the optical densities are still those of the slide as it was scanned.

    Args:
        mean, std: of the channels, for pixels between 0 and 1.
    """

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    @torch.no_grad()
    def forward(self, views: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        """Normalised views (V, B, 3, H, W) of uint8 `views` (B, V, H, W, 3) and their `colours` (B, V, COLUMNS).

        `colours` say what is to be done, so they are best left on the CPU: from a device they have to be fetched.
        """
        batch, n_views, height, width = views.shape[:4]
        views = views.transpose(0, 1).flatten(0, 1)  # (V * B, H, W, 3)
        colours = colours.transpose(0, 1).flatten(0, 1).cpu()  # (V * B, COLUMNS)
        done = torch.empty(len(views), 3, height, width, device=views.device)
        on_cpu = views.device.type == "cpu"
        most = max(1, CPU_PIXELS // (height * width)) if on_cpu else len(views)
        for members, hue_place in alike(colours, most):
            pixels = views[members.to(views.device, non_blocking=True)].permute(0, 3, 1, 2)
            pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
            pixels = change_colours(pixels, colours[members], hue_place).mul_(self.scale)
            if on_cpu:
                for place, view in zip(members.tolist(), pixels):
                    torch.add(view, self.shift, out=done[place])
            else:
                done[members.to(views.device, non_blocking=True)] = pixels.add_(self.shift)
        return done.unflatten(0, (n_views, batch))


def alike(colours: torch.Tensor, most: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Which views, at most `most`, have their hue changed at the same place in the order, 0 to 3; 4 without any jitter."""
    place = (colours[:, ORDER] == HUE).int().argmax(1)
    place[(colours[:, :4] == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(1)] = 4
    for hue_place in place.unique().tolist():
        for members in (place == hue_place).nonzero().squeeze(1).split(most):
            yield members, hue_place


def change_colours(pixels: torch.Tensor, colours: torch.Tensor, hue_place: int) -> torch.Tensor:
    """`pixels` (N, 3, H, W), 0 to 255, changed in place by their `colours` (N, COLUMNS) on the CPU."""
    stains = (colours[:, STAIN_FACTORS] != 1).any(1) | (colours[:, STAIN_SHIFTS] != 0).any(1)
    pixels = _apply(change_stains, pixels, colours, stains)
    if hue_place < 4:
        pixels = jitter(pixels, colours, hue_place)
    pixels = _apply(lambda x, _: gray(x).expand_as(x), pixels, colours, colours[:, GRAY] > 0)
    pixels = blur(pixels, colours[:, BLUR])
    return _apply(lambda x, _: torch.where(x >= 128, 255 - x, x), pixels, colours, colours[:, SOLARIZE] > 0)


def _apply(
    change: Callable[..., torch.Tensor], pixels: torch.Tensor, colours: torch.Tensor, here: torch.Tensor
) -> torch.Tensor:
    """`pixels` whose views `here` (N,) were replaced by what `change` makes of them and of their `colours`."""
    chosen = here.nonzero().squeeze(1)
    if len(chosen):
        on_device = chosen.to(pixels.device, non_blocking=True)
        pixels[on_device] = change(pixels[on_device], colours[chosen])
    return pixels


def jitter(pixels: torch.Tensor, colours: torch.Tensor, hue_place: int) -> torch.Tensor:
    """`pixels` with brightness, contrast, saturation and hue changed, each view's in its own order.

    Brightness, contrast and saturation are one formula, a mixture of the view with black, with its mean luma, or with
    the luma of each pixel; so all views take their first, second and third of these together, and the hue in between.
    """
    order = colours[:, ORDER].long()
    kinds = order[order != HUE].view(-1, 3)  # the others in their order
    amounts = colours.gather(1, kinds)
    level_weight, luma_weight = ((1 - amounts) * (kinds == kind) for kind in (CONTRAST, SATURATION))
    weights = torch.stack([amounts.T, level_weight.T, luma_weight.T], dim=1)  # (3 places, 3 weights, N)
    weights = weights[..., None, None, None].to(pixels.device, non_blocking=True)
    turns = colours[:, HUE].view(-1, 1, 1, 1).to(pixels.device, non_blocking=True)
    for place in range(4):
        if place == hue_place:
            pixels = turn_hue(pixels, turns)
        if place < 3:
            pixels = mix(pixels, *weights[place])
    return pixels


def mix(
    pixels: torch.Tensor, own_weight: torch.Tensor, level_weight: torch.Tensor, luma_weight: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of `pixels`, their mean luma, and the luma of each, 0 to 255; the weights are (N, 1, 1, 1)."""
    luma = gray(pixels)
    level = luma.mean(dim=(2, 3), keepdim=True)
    other = luma.mul_(luma_weight).add_(level * level_weight)
    return pixels.mul_(own_weight).add_(other).clamp_(0, 255)


def gray(pixels: torch.Tensor) -> torch.Tensor:
    """The luma (N, 1, H, W) of `pixels` (N, 3, H, W)."""
    red, green, blue = pixels.split(1, dim=1)
    return red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def turn_hue(pixels: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """`pixels` (N, 3, H, W) with the hue of HSV turned by `turns` (N, 1, 1, 1) of a circle; saturation and value stay.

    Without cases, which are slow. On a circle of six, with red at 0, green at 2 and blue at -2, the distance of a hue from
    red is 1 + (green + blue - red - least) / (most - least), on green's side when there is more green than blue. A channel
    is full within 1 of its own hue, empty beyond 2, and linear in between.
    """
    red, green, blue = pixels.split(1, dim=1)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(least)
    hue = (green + blue).sub_(red).sub_(least).div_(chroma.clamp(min=1e-8)).add_(1).copysign_(green - blue)
    hue.add_(6 * (turns - turns.round()))  # between -6 and 6
    hue.sub_(hue.div(6).round_(), alpha=6)  # between -3 and 3
    turned = torch.empty_like(pixels)
    full = [
        (2 - hue.abs()).clamp_(0, 1),
        hue.clamp(0, 1).add_((-2 - hue).clamp_(0, 1)),
        hue.neg().clamp_(0, 1).add_((hue - 2).clamp_(0, 1)),
    ]
    for channel, share in zip(turned.split(1, dim=1), full):
        torch.addcmul(least, share, chroma, out=channel)
    return turned


def change_stains(pixels: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """`pixels` (N, 3, H, W) whose stains were changed by the factors and shifts in their `colours`.

    The optical density, -ln of the light that comes through, is a sum of the stains: density = amounts @ stains. So new
    amounts, factor * amount + shift, are a matrix for the density and a shift of it.
    """
    stains = nn.functional.normalize(torch.tensor(STAINS), dim=1)
    matrices = torch.linalg.inv(stains) @ (colours[:, STAIN_FACTORS, None] * stains)  # (N, 3, 3)
    shifts = (colours[:, STAIN_SHIFTS] @ stains)[:, :, None, None]  # (N, 3, 1, 1)
    rows = matrices[..., None, None].to(pixels.device, non_blocking=True).unbind(1)  # three of (N, 3, 1, 1)
    density = pixels.div(255).clamp_(min=DARKEST).log_().neg_().split(1, dim=1)
    total = shifts.to(pixels.device, non_blocking=True) + rows[0] * density[0]
    for row, channel in zip(rows[1:], density[1:]):
        total.addcmul_(row, channel)
    return total.neg_().exp_().mul_(255).clamp_(max=255)


def blur(pixels: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Each view of `pixels` (N, 3, H, W) blurred by a Gaussian of its `sigma` (N,) pixels, on the CPU; edges are mirrored.

    A Gaussian ends at three standard deviations, rounded up to pixels; 0 blurs nothing. On the CPU OpenCV blurs faster
    than torch, which would read all pixels again for each weight of the Gaussian.
    """
    radii = (3 * sigma).ceil().clamp(max=min(pixels.shape[2:]) - 1).int()
    if pixels.device.type != "cpu":
        return convolve(pixels, sigma, radii) if radii.any() else pixels
    for view, deviation, radius in zip(pixels.numpy(), sigma.tolist(), radii.tolist()):
        size = (2 * radius + 1, 2 * radius + 1)
        for plane in view if radius else ():
            cv2.GaussianBlur(plane, size, deviation, dst=plane, borderType=cv2.BORDER_REFLECT_101)
    return pixels


def convolve(pixels: torch.Tensor, sigma: torch.Tensor, radii: torch.Tensor) -> torch.Tensor:
    """The blur of all `pixels` (N, 3, H, W) in two convolutions, for a GPU; `radii` (N,) are where each Gaussian ends."""
    count, channels = pixels.shape[:2]
    widest = int(radii.max())
    place = torch.arange(-widest, widest + 1)
    weights = torch.exp(-0.5 * (place / sigma.clamp(min=0.01)[:, None]) ** 2) * (place.abs() <= radii[:, None])
    weights = weights / weights.sum(1, keepdim=True)  # (N, taps)
    kernels = weights.repeat_interleave(channels, dim=0)[:, None, None].to(pixels.device, non_blocking=True)
    padded = nn.functional.pad(pixels, (widest,) * 4, mode="reflect").flatten(0, 1)[None]  # (1, N * 3, ...)
    rows = nn.functional.conv2d(padded, kernels, groups=len(kernels))  # each channel of each view by itself
    both = nn.functional.conv2d(rows, kernels.transpose(2, 3), groups=len(kernels))
    return both[0].unflatten(0, (count, channels))
