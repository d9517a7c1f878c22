"""Features of regions and of slides, made of those of tiles by the second level of a hierarchy.

A hierarchy has up to three levels in its folder, `tile_level/` and `region_level/` with a file for each slide, and
`slide_level.safetensors`.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..slides.store import load_arrays, save_arrays
from .encoder import Encoder
from .store import SlideFeatures, features_path


TILE_LEVEL, REGION_LEVEL, SLIDE_LEVEL = "tile_level", "region_level", "slide_level.safetensors"
POOLING = "region"  # the rule by which the vector of a region was made: the class token of the second level
BATCH = 16  # regions at once


def check_tile_features(bag: SlideFeatures, encoder: Encoder) -> None:
    """Raises UserError when the tiles of the bag have not been encoded by the first level of the hierarchy `encoder`."""
    made_by = (encoder.revision, encoder.hierarchy.config.tile_revision)
    if bag.revision not in made_by or bag.pooling != encoder.pooling or bag.size != encoder.size:
        raise UserError(
            f"{bag.slide} has features ({bag.pooling}, {bag.size} px) by {bag.encoder}, revision {bag.revision}, and the "
            f"first level of {encoder.name} ({encoder.pooling}, {encoder.size} px) is {made_by[1] or 'of no known revision'}: "
            "embed the slides with it"
        )
    if bag.region == 1:
        raise UserError(f"{bag.slide} has features of single tiles: embed it with --regions")
    if len(bag) == 0 or len(bag) % bag.region**2:
        raise UserError(f"{bag.slide} has {len(bag)} tiles, no whole regions of {bag.region**2}: embed it again")


@torch.inference_mode()
def region_features(bag: SlideFeatures, encoder: Encoder) -> SlideFeatures:
    """The features of the regions of a bag, by the second level of the encoder that made it: a bag of regions.

    Tiles that could not be read are not attended to; a region without any other is invalid.
    """
    edge, width = bag.region, bag.features.shape[1]
    grids = np.nan_to_num(np.asarray(bag.features, np.float32)).reshape(-1, edge, edge, width)
    masks = np.array(bag.valid).reshape(-1, edge, edge)
    parts = []
    for start in range(0, len(grids), BATCH):
        batch = slice(start, start + BATCH)
        features = torch.from_numpy(grids[batch]).to(encoder.device).permute(0, 3, 1, 2)
        mask = torch.from_numpy(masks[batch]).to(encoder.device)
        parts.append(
            encoder.hierarchy.region_encoder(features, None if mask.all() else mask)
            .pooler_output.float()
            .cpu()
            .numpy()
        )
    features, valid = np.concatenate(parts), masks.any(axis=(1, 2))
    features[~valid] = np.nan
    return SlideFeatures(
        slide=bag.slide,
        encoder=encoder.name,
        revision=encoder.revision,
        pooling=POOLING,
        size=bag.size * edge,
        mpp=bag.mpp,
        extent=(bag.extent[0] * edge, bag.extent[1] * edge),
        slide_size=bag.slide_size,
        features=features,
        xy=np.asarray(bag.xy)[:: edge**2],
        valid=valid,
        slide_file=bag.slide_file,
    )


def write_region_features(tile_level: Path, region_level: Path, slide: str, encoder: Encoder) -> int:
    """Writes the features of the regions of a slide whose tiles lie in `tile_level`; returns how many regions it has.

    What is there already, of these tiles and by this encoder, is kept.
    """
    bag = SlideFeatures.load(features_path(tile_level, slide))
    path = features_path(region_level, slide)
    try:
        found = SlideFeatures.load(path)
        same = (found.revision, found.size, found.extent, found.slide_file)
        wanted = (
            encoder.revision,
            bag.size * bag.region,
            tuple(each * bag.region for each in bag.extent),
            bag.slide_file,
        )
        if same == wanted and np.array_equal(found.xy, np.asarray(bag.xy)[:: bag.region**2]):
            return len(found)
    except UserError:
        pass  # absent or damaged
    made = region_features(bag, encoder)
    made.save(path)
    return len(made)


def write_slide_level(path: Path, folder: Path, slides: Iterable[str], encoder: Encoder) -> None:
    """Writes the embeddings of slides to one file: the mean over the regions of each, whose features lie in `folder`."""
    keys, means = [], []
    for slide in slides:
        bag = SlideFeatures.load(features_path(folder, slide))
        if bag.valid.any():
            keys.append(slide)
            means.append(bag.features[bag.valid].mean(axis=0, dtype=np.float64))
    facts = {"kind": "slide_embeddings", "slides": keys, "encoder": encoder.name, "revision": encoder.revision}
    save_arrays(path, {"embeddings": np.array(means, np.float32)}, facts)


def read_slide_level(path: Path) -> tuple[list[str], np.ndarray]:
    """The keys of the slides in the file, and their embeddings, float32 (S, D). Raises UserError when it holds none."""
    arrays, facts = load_arrays(path, mapped=False, verify=True)
    if facts.get("kind") != "slide_embeddings":
        raise UserError(f"{path} holds no slide embeddings: make them with `hf-pathology embed` and a hierarchy")
    return facts["slides"], arrays["embeddings"]
