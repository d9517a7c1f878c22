"""Adapts a released encoder to a folder of labelled tiles by LoRA, and says what that gains over two simpler ways.

    accelerate launch recipes/finetune_lora.py --config recipes/configs/lora_vit.yaml \
        --encoder DIR_OR_ID --tiles DIR --out DIR

LoRA: Hu et al. 2022, arXiv 2106.09685. The simpler ways are a linear probe on the frozen encoder, and logistic
regression on six colour numbers of each tile: on many tile sets colour alone nearly solves the task.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, get_scheduler

from hf_pathology.atomic import atomic_directory, atomic_path, write_json
from hf_pathology.errors import UserError
from hf_pathology.evaluation.scoring import load_metric
from hf_pathology.features.pooling import pool, pooling_of
from hf_pathology.modeling.modeling_tile_classifier import vit_classifier
from hf_pathology.tiles.folder import LabelledTiles, TileDataset, colour_numbers, read_tile_folder, split_by_group
from hf_pathology.training.config import parse_config


# The projections of the attention, under their names in transformers 5.9 and later, and in other encoders.
QUERY_AND_VALUE = r".*\.(q_proj|v_proj|query|value)"

ADAPTER_CARD = """---
base_model: {base}
library_name: peft
tags: [lora, pathology]
---

A LoRA adapter of `{base}`, trained on tiles of {classes}. `AutoModel.from_pretrained` loads it with its base and needs
peft and transformers 5.9 or later; the merged encoder needs neither.
"""


@dataclass
class LoraOptions:
    """What to adapt, on which tiles, and how; the numbers are those of Owkin's Phikon tutorial (configs/lora_vit.yaml)."""

    encoder: str = field(metadata={"help": "directory or Hub id of the encoder"})
    tiles: str = field(metadata={"help": "folder of labelled tiles: class sub-folders, or a manifest.csv"})
    out: str = field(metadata={"help": "gets adapter/, merged/, classifier/, metrics.json and predictions.csv"})
    table: str | None = field(default=None, metadata={"help": "CSV with path, class, and maybe group and split"})
    mpp: float | None = field(default=None, metadata={"help": "microns per pixel of the tiles, when known"})
    val_fraction: float = field(default=0.2, metadata={"help": "held out by group when the folder states no split"})
    rank: int = 16
    alpha: int = 16
    dropout: float = 0.1
    epochs: int = 10
    batch_size: int = field(default=128, metadata={"help": "tiles in a step of one process"})
    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    warmup_fraction: float = 0.1
    workers: int = 4
    seed: int = 0
    cpu: bool = False


# Tiles to views.


def read_tiles(options: LoraOptions) -> LabelledTiles:
    """The labelled tiles with the split they state, or else one by group."""
    tiles = read_tile_folder(options.tiles, options.table, options.mpp)
    return tiles if tiles.splits is not None else split_by_group(tiles, options.val_fraction, options.seed)


def plain_view(tile: torch.Tensor, processor: BaseImageProcessor) -> torch.Tensor:
    """The tile as the release's processor resizes and crops it, still uint8 (3, size, size)."""
    return processor(images=tile, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]


def random_view(tile: torch.Tensor, crop: v2.Transform) -> torch.Tensor:
    """A crop of the tile, turned by a multiple of 90 degrees and perhaps mirrored, uint8 (3, size, size)."""
    tile = torch.rot90(crop(tile), int(torch.randint(4, ())), dims=(1, 2))
    return tile.flip(2) if torch.rand(()) < 0.5 else tile


def training_loader(tiles: LabelledTiles, processor: BaseImageProcessor, options: LoraOptions) -> DataLoader:
    """Shuffled batches of random views, {"tiles": uint8 (B, 3, size, size), "labels": int64 (B,)}."""
    # A mild crop, because the size of things is what a pathologist reads.
    crop = v2.RandomResizedCrop(processor.tile_size, scale=(0.7, 1.0), ratio=(0.9, 1.1))
    dataset = TileDataset(tiles, partial(random_view, crop=crop))
    return DataLoader(dataset, options.batch_size, shuffle=True, num_workers=options.workers)


# Views to loss.


def load_release(encoder: str, tiles_mpp: float | None) -> tuple[nn.Module, BaseImageProcessor]:
    """The encoder and its image processor, which in any case says `pooling`, `tile_size` and `mpp` afterwards.

    Raises UserError when weights are missing, or the encoder is made for another resolution than that of the tiles.
    """
    model, loading = AutoModel.from_pretrained(encoder, output_loading_info=True)
    missing = sorted(loading["missing_keys"])
    if any(not key.startswith("pooler.") for key in missing):
        raise UserError(f"{encoder} lacks the weights {', '.join(missing[:5])}: it is not a whole encoder")
    if missing:
        # A pooler that nobody trained would go into merged/ as noise: it becomes the identity, as in our releases.
        model.config.pooler_act, model.pooler.activation = "linear", nn.Identity()
        nn.init.eye_(model.pooler.dense.weight)
        nn.init.zeros_(model.pooler.dense.bias)
    processor = AutoImageProcessor.from_pretrained(encoder)
    mpp = getattr(processor, "mpp", None)
    if None not in (mpp, tiles_mpp) and abs(tiles_mpp / mpp - 1) > 0.1:
        raise UserError(f"{encoder} is made for {mpp} mpp, the tiles have {tiles_mpp}: bring the tiles to {mpp}")
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    processor.mpp = tiles_mpp if mpp is None else mpp
    processor.tile_size = getattr(processor, "tile_size", None) or size["height"]
    processor.pooling = pooling_of(getattr(processor, "pooling", None), encoder, model.config.model_type)
    return model, processor


class TileClassifier(nn.Module):
    """An encoder (plain or with LoRA) and one linear layer, with the statistics and pooling rule of the release."""

    def __init__(self, encoder: nn.Module, processor: BaseImageProcessor, classes: int):
        super().__init__()
        self.encoder, self.processor = encoder, processor
        self.prefix_tokens = 1 + getattr(encoder.config, "num_register_tokens", 0)
        self.head = nn.Linear(encoder.config.hidden_size * (2 if processor.pooling == "cls+mean" else 1), classes)

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits (B, classes) and features (B, D) of uint8 tiles (B, 3, size, size)."""
        inputs = self.processor(images=tiles, do_resize=False, do_center_crop=False, return_tensors="pt")
        tokens = self.encoder(inputs["pixel_values"]).last_hidden_state  # (B, 1 + patches, D)
        features = pool(tokens, self.processor.pooling, self.prefix_tokens)
        return self.head(features), features


def add_lora(encoder: nn.Module, options: LoraOptions) -> PeftModel:
    """The encoder with a low-rank update beside each query and value projection; nothing else of it learns."""
    targets = {"target_modules": QUERY_AND_VALUE, "lora_dropout": options.dropout}
    return get_peft_model(encoder, LoraConfig(r=options.rank, lora_alpha=options.alpha, **targets))


def train(model: TileClassifier, tiles: LabelledTiles, options: LoraOptions, accelerator: Accelerator) -> list[float]:
    """Trains the adapter and the head in place; the mean loss of each epoch. Raises UserError when it is not finite."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=options.learning_rate, weight_decay=options.weight_decay)
    loader = training_loader(tiles, model.processor, options)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = options.epochs * len(loader)
    # The schedule is not prepared: accelerate would step it once for every process.
    schedule = get_scheduler("cosine", optimizer, round(options.warmup_fraction * steps), steps)
    losses = []
    for epoch in range(1, options.epochs + 1):
        wrapped.train()
        total = torch.zeros((), device=accelerator.device)
        for batch in loader:
            with accelerator.autocast():
                logits, _ = wrapped(batch["tiles"])
                loss = nn.functional.cross_entropy(logits, batch["labels"])
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.detach()
        losses.append(accelerator.reduce(total, "mean").item() / len(loader))
        accelerator.print(f"epoch {epoch} of {options.epochs}: loss {losses[-1]:.4f}")
        if not np.isfinite(losses[-1]):
            raise UserError(f"the loss of epoch {epoch} is {losses[-1]}: lower --learning_rate")
    return losses


@torch.no_grad()
def predict(
    model: TileClassifier, tiles: LabelledTiles, options: LoraOptions, accelerator: Accelerator
) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities (N, C) and features (N, D), float32, of the plain view of every tile, in order."""
    dataset = TileDataset(tiles, partial(plain_view, processor=model.processor))
    loader = accelerator.prepare(DataLoader(dataset, options.batch_size, num_workers=options.workers))
    model.to(accelerator.device).eval()
    parts = []
    for batch in loader:
        with accelerator.autocast():
            logits, features = model(batch["tiles"])
        parts.append(accelerator.gather_for_metrics((logits.float().softmax(dim=-1), features.float())))
    probabilities, features = (torch.cat(part).cpu().numpy() for part in zip(*parts))
    return probabilities, features


# Loss to release.


def probe(train_x: np.ndarray, train_labels: np.ndarray, val_x: np.ndarray) -> np.ndarray:
    """Class probabilities (M, C) of `val_x` (M, D) by logistic regression on the standardised `train_x` (N, D)."""
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    return regression.fit(train_x, train_labels).predict_proba(val_x)


def save_release(model: nn.Module, processor: BaseImageProcessor, folder: Path, card: str | None = None) -> None:
    """Writes the model, its processor and its card into `folder`, whole or not at all."""
    with atomic_directory(folder) as partial_folder:
        model.save_pretrained(partial_folder)
        processor.save_pretrained(partial_folder)
        # transformers leaves out an attribute that is None, but an unknown resolution is stated.
        file = partial_folder / "preprocessor_config.json"
        write_json(file, {**json.loads(file.read_text()), "mpp": processor.mpp})
        if card is not None:
            (partial_folder / "README.md").write_text(card, encoding="utf-8")


def save_models(model: TileClassifier, classes: Sequence[str], out: Path) -> None:
    """Writes adapter/, merged/ and classifier/. Afterwards `model` has its adapter merged."""
    base = model.encoder.peft_config["default"].base_model_name_or_path
    card = ADAPTER_CARD.format(base=base, classes=", ".join(classes))
    save_release(model.encoder, model.processor, out / "adapter", card)
    model.encoder = model.encoder.merge_and_unload()
    save_release(model.encoder, model.processor, out / "merged")
    if model.encoder.config.model_type == "vit" and model.processor.pooling == "cls":
        save_release(vit_classifier(model.encoder, model.head, classes), model.processor, out / "classifier")
        return
    # No class of transformers pools in another way, so the head is saved alone, to put on the features of merged/.
    with atomic_directory(out / "classifier") as folder:
        save_file(model.head.state_dict(), folder / "head.safetensors", {"classes": json.dumps(list(classes))})


def prediction_table(tiles: LabelledTiles, probabilities: np.ndarray) -> pd.DataFrame:
    """One row for each tile: path, group, true and predicted class, and the probability of each class."""
    names = np.array(tiles.classes)
    known = {"path": tiles.paths, "group": tiles.groups, "class": names[tiles.labels]}
    columns = {f"prob_{name}": probabilities[:, index] for index, name in enumerate(names)}
    return pd.DataFrame({**known, "predicted": names[probabilities.argmax(axis=1)], **columns})


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_config(LoraOptions, argv=argv)
    accelerator, out = Accelerator(cpu=options.cpu), Path(options.out)
    set_seed(options.seed)
    tiles = read_tiles(options)
    train_tiles, val_tiles = tiles.subset("train"), tiles.subset("val")
    encoder, processor = load_release(options.encoder, tiles.mpp)

    # Colour comes first because it decodes every tile: a damaged one is named before anything is trained.
    colour = probe(colour_numbers(train_tiles), train_tiles.labels, colour_numbers(val_tiles))
    model = TileClassifier(add_lora(encoder, options), processor, len(tiles.classes))
    # An adapter starts as the identity, so these are the features of the frozen encoder.
    (_, train_x), (_, val_x) = (predict(model, part, options, accelerator) for part in (train_tiles, val_tiles))
    frozen = probe(train_x, train_tiles.labels, val_x)
    losses = train(model, train_tiles, options, accelerator)
    adapted, _ = predict(model, val_tiles, options, accelerator)

    if accelerator.is_main_process:
        metric = load_metric("classification")
        ways = {"colour_regression": colour, "frozen_probe": frozen, "lora": adapted}
        scores = {way: metric.compute(predictions=found, references=val_tiles.labels) for way, found in ways.items()}
        save_models(model, tiles.classes, out)
        with atomic_path(out / "predictions.csv") as partial_file:
            prediction_table(val_tiles, adapted).to_csv(partial_file, index=False)
        facts = {"classes": tiles.classes, "train_tiles": len(train_tiles), "val_tiles": len(val_tiles)}
        write_json(out / "metrics.json", {**scores, "losses": losses, **facts, "options": asdict(options)})
        print(pd.DataFrame(scores).T.round(3).to_string())


if __name__ == "__main__":
    main()
