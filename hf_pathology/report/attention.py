"""What a ViT looks at: attention of its class token, and the features of its patches."""

import cv2
import matplotlib
import numpy as np
import torch

from ..errors import UserError
from ..features.encoder import Encoder


def attention_maps(encoder: Encoder, tiles: np.ndarray) -> np.ndarray:
    """How strongly the class token attends to each patch in the last layer, float32 (B, heads, h', w').

    The values of a head sum to at most 1; what is missing went to the class token itself and to registers.

    Args:
        encoder: a ViT loaded with `attention="eager"`, the only implementation that returns its attention.
        tiles: uint8 (B, h, w, 3).

    Raises UserError when the encoder returns no attention.
    """
    with torch.inference_mode():
        output = encoder.model(encoder.pixels(torch.from_numpy(tiles)), output_attentions=True)
    if not output.get("attentions"):
        raise UserError(f'{encoder.name} returns no attention: load a ViT with load_encoder(..., attention="eager")')
    rows = output.attentions[-1][:, :, 0, encoder.prefix_tokens :]  # (B, heads, patches)
    return rows.unflatten(-1, patch_lattice(rows.shape[-1])).float().cpu().numpy()


def patch_features(encoder: Encoder, tiles: np.ndarray) -> np.ndarray:
    """The features of the patches of uint8 `tiles` (B, h, w, 3), float32 (B, h', w', D).

    They are the last hidden state, or the feature map of a convolutional network.
    """
    with torch.inference_mode():
        output = encoder.model(encoder.pixels(torch.from_numpy(tiles))).last_hidden_state
    if output.ndim == 4:
        return output.permute(0, 2, 3, 1).float().cpu().numpy()
    patches = output[:, encoder.prefix_tokens :]  # (B, patches, D)
    return patches.unflatten(1, patch_lattice(patches.shape[1])).float().cpu().numpy()


def patch_lattice(patches: int) -> tuple[int, int]:
    """Rows and columns of the patches of a square tile. Raises UserError when they form no square."""
    edge = round(patches**0.5)
    if edge**2 != patches:
        raise UserError(f"{patches} patches are no square: the encoder has tokens that its release does not declare")
    return edge, edge


def draw_attention(tile: np.ndarray, attention: np.ndarray, *, colormap: str = "inferno") -> np.ndarray:
    """The tile, uint8 (h, w, 3), in grey, glowing where its attention (h', w') is high; from its own least to its most."""
    spread = attention.max() - attention.min()
    relative = (attention - attention.min()) / (spread if spread > 0 else 1)
    smooth = cv2.resize(relative.astype(np.float32), tile.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colours = matplotlib.colormaps[colormap](smooth, bytes=True)[..., :3]
    strength = 0.1 + 0.7 * smooth[..., None]
    grey = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)[..., None]
    return np.rint(strength * colours + (1 - strength) * grey).astype(np.uint8)
