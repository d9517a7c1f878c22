"""Embeds the tiles of a grid: reading and the encoder at the same time, one batch ahead."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..errors import SlideError, UserError
from ..slides.grid import TileGrid
from ..slides.reader import Slide
from .encoder import Encoder
from .store import SlideFeatures


MAX_INVALID = 0.01  # share of a slide's tiles that may be unreadable before the slide fails


def check_resolution(encoder: Encoder, mpp: float) -> None:
    """Raises UserError when tiles at `mpp` are not what the encoder was trained on."""
    if encoder.mpp is not None and abs(mpp / encoder.mpp - 1) > 0.01:
        raise UserError(
            f"{encoder.name} was trained at {encoder.mpp} mpp and the tiles are at {mpp}: "
            f"tile again with --mpp {encoder.mpp}, or pass --other-mpp to embed them all the same"
        )


def embed(grid: TileGrid, slide: Slide, encoder: Encoder, *, batch_size: int = 64) -> SlideFeatures:
    """The features of all tiles of `grid`, with those that could not be read marked invalid.

    Raises SlideError when more than 1 % of the tiles cannot be read.
    """
    batches = [grid.xy[start : start + batch_size] for start in range(0, len(grid), batch_size)]
    features, valid = [], []
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(slide.read_tiles, batches[0], grid.size, grid.mpp)
        for following in [*batches[1:], None]:
            tiles, readable = ahead.result()
            if following is not None:
                ahead = reader.submit(slide.read_tiles, following, grid.size, grid.mpp)
            vectors = encoder(torch.from_numpy(tiles)).numpy()
            vectors[~readable] = np.nan
            features.append(vectors)
            valid.append(readable)
    slide.close()
    valid = np.concatenate(valid)
    unreadable = int((~valid).sum())
    if unreadable > MAX_INVALID * len(valid):
        raise SlideError(
            f"{slide.path} has {unreadable} of {len(valid)} tiles that cannot be read: the file is damaged, get it again"
        )
    return SlideFeatures.of_grid(
        grid,
        np.concatenate(features).astype(np.float32),
        valid,
        encoder=encoder.name,
        revision=encoder.revision,
        pooling=encoder.pooling,
    )
