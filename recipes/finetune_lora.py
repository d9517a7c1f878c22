"""Adapts a released encoder to a folder of labelled tiles by LoRA, and says what was gained over two simpler ways.

    accelerate launch recipes/finetune_lora.py --config recipes/configs/lora_vit.yaml \
        --encoder DIR_OR_ID --tiles DIR --out DIR

LoRA: Hu et al. 2022, arXiv 2106.09685. The two simpler ways are a linear probe on the frozen encoder, and logistic
regression on six colour numbers of each tile: on many tile sets colour alone nearly solves the task.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModel

from hf_pathology.errors import UserError
from hf_pathology.features.pooling import pooling_of
from hf_pathology.tiles.folder import LabelledTiles, read_tile_folder, split_by_group


@dataclass
class LoraOptions:
    """What to adapt, on which tiles, and the numbers of Owkin's Phikon tutorial (see configs/lora_vit.yaml)."""

    encoder: str = field(metadata={"help": "directory or Hub id of the encoder"})
    tiles: str = field(metadata={"help": "folder of labelled tiles: class sub-folders, or a manifest.csv"})
    out: str = field(metadata={"help": "directory for adapter/, merged/, classifier/, metrics.json, predictions.csv"})
    table: str | None = field(default=None, metadata={"help": "CSV with path, class, and maybe group and split"})
    mpp: float | None = field(default=None, metadata={"help": "microns per pixel of the tiles, when known"})
    val_fraction: float = field(default=0.2, metadata={"help": "held out by group when the folder states no split"})
    rank: int = 16
    alpha: int = 16
    dropout: float = 0.1
    epochs: int = 10
    batch_size: int = field(default=128, metadata={"help": "tiles per process and step"})
    lr: float = 5e-3
    weight_decay: float = 0.0
    warmup_fraction: float = 0.1
    workers: int = 4
    seed: int = 0
    cpu: bool = False


# Slides to tiles to views.


def load_release(encoder: str) -> tuple[nn.Module, object, str]:
    """The encoder, its image processor and its pooling rule. Raises UserError when weights are missing."""
    model, loading = AutoModel.from_pretrained(encoder, output_loading_info=True)
    missing = sorted(loading["missing_keys"])
    if any(not key.startswith("pooler.") for key in missing):
        raise UserError(f"{encoder} lacks the weights {', '.join(missing[:5])}: it is not a whole encoder")
    if missing:
        # A pooler that was never trained would travel into merged/ as noise: it becomes the identity, as in our releases.
        model.config.pooler_act, model.pooler.activation = "linear", nn.Identity()
        nn.init.eye_(model.pooler.dense.weight)
        nn.init.zeros_(model.pooler.dense.bias)
    processor = AutoImageProcessor.from_pretrained(encoder)
    return model, processor, pooling_of(getattr(processor, "pooling", None), encoder, model.config.model_type)


def read_tiles(options: LoraOptions) -> LabelledTiles:
    """The labelled tiles with the split they state, or else one by group."""
    tiles = read_tile_folder(options.tiles, options.table, options.mpp)
    return tiles if tiles.splits is not None else split_by_group(tiles, options.val_fraction, options.seed)


def random_view(tile: torch.Tensor, crop: v2.Transform) -> torch.Tensor:
    """`crop` of the tile (3, H, W), turned by a random multiple of 90 degrees and perhaps mirrored."""
    tile = torch.rot90(crop(tile), int(torch.randint(4, ())), dims=(1, 2))
    return tile.flip(2) if torch.rand(()) < 0.5 else tile


def training_view(size: int) -> partial:
    """A view for training, uint8 (3, size, size): a mild crop, since resolution means something, in any orientation."""
    return partial(random_view, crop=v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.9, 1.1)))
