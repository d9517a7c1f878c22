"""Adapts a released encoder to a folder of labelled tiles by LoRA, and says what that gains over two simpler ways.

    accelerate launch recipes/finetune_lora.py --config recipes/configs/lora_vit.yaml \
        --encoder DIR_OR_ID --tiles DIR --out DIR

LoRA: Hu et al. 2022, arXiv 2106.09685. The simpler ways are a linear probe on the frozen encoder, and logistic
regression on six colour numbers of each tile: on many tile sets colour alone nearly solves the task.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import get_scheduler

from hf_pathology.atomic import atomic_directory, atomic_path, write_json
from hf_pathology.errors import UserError
from hf_pathology.evaluation.intervals import accuracy_interval
from hf_pathology.evaluation.probe import logistic_probe
from hf_pathology.evaluation.scoring import load_metric
from hf_pathology.features.encoder import Encoder, load_encoder
from hf_pathology.features.pooling import pool
from hf_pathology.hub_upload.cards.card import Base, CardOptions, write_card
from hf_pathology.hub_upload.cards.cost import cost_of_seconds
from hf_pathology.hub_upload.cards.head_cards import adapter_card
from hf_pathology.hub_upload.export import release_model, release_processor, write_release
from hf_pathology.modeling.modeling_tile_classifier import vit_classifier
from hf_pathology.tiles.folder import LabelledTiles, TileDataset, colour_numbers, read_tile_folder, split_by_group
from hf_pathology.training.config import parse_config
from hf_pathology.training.machine import machine_of
from hf_pathology.training.start import run_recipe, start


# The projections of the attention, under their names in transformers 5.9 and later, and in other encoders.
QUERY_AND_VALUE = r".*\.(q_proj|v_proj|query|value)"


@dataclass
class LoraOptions:
    """What to adapt, on which tiles, and how; where the numbers come from stands in configs/lora_vit.yaml."""

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


def plain_view(size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Makes of a tile, uint8 (h, w, 3), the same at the size of the encoder's input, uint8 (size, size, 3)."""
    return partial(_view, transform=v2.Resize([size, size], v2.InterpolationMode.BICUBIC))


def random_view(size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Makes of a tile, uint8 (h, w, 3), a mild crop in any of the eight orientations, uint8 (size, size, 3).

    The crop is mild because the size of things is what a pathologist reads.
    """
    crop = v2.RandomResizedCrop(size, (0.7, 1.0), (0.9, 1.1), v2.InterpolationMode.BICUBIC)
    turns = v2.RandomChoice([v2.RandomRotation((angle, angle)) for angle in (0, 90, 180, 270)])
    return partial(_view, transform=v2.Compose([crop, turns, v2.RandomHorizontalFlip()]))


def _view(tile: np.ndarray, transform: v2.Transform) -> np.ndarray:
    return transform(torch.from_numpy(tile).permute(2, 0, 1)).permute(1, 2, 0).numpy()


# Views to loss.


class TileClassifier(nn.Module):
    """An encoder, plain or with LoRA, and one linear layer on its features.

    Args:
        model: `encoder.model`, or the same with an adapter.
        encoder: says with which statistics tiles go in, and how the output is pooled.
        classes: how many.
    """

    def __init__(self, model: nn.Module, encoder: Encoder, classes: int):
        super().__init__()
        self.model, self.encoder = model, encoder
        self.head = nn.Linear(model.config.hidden_size * (2 if encoder.pooling == "cls+mean" else 1), classes)

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits (B, classes) and features (B, D) of uint8 tiles (B, size, size, 3)."""
        tokens = self.model(self.encoder.pixels(tiles)).last_hidden_state  # (B, 1 + patches, D)
        features = pool(tokens, self.encoder.pooling, self.encoder.prefix_tokens)
        return self.head(features), features


def load_for(tiles: LabelledTiles, encoder: str) -> Encoder:
    """The encoder, at the resolution of the tiles where its release states none. Raises UserError when both differ."""
    loaded = load_encoder(encoder)
    if loaded.mpp is None:
        return replace(loaded, mpp=tiles.mpp)
    if tiles.mpp is not None and abs(tiles.mpp / loaded.mpp - 1) > 0.01:
        raise UserError(
            f"{encoder} was trained at {loaded.mpp} mpp and the tiles are at {tiles.mpp}: resize the tiles"
        )
    return loaded


def add_lora(model: nn.Module, options: LoraOptions) -> PeftModel:
    """The model with a low-rank update beside each query and value projection; nothing else of it learns."""
    targets = {"target_modules": QUERY_AND_VALUE, "lora_dropout": options.dropout}
    return get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=options.alpha, **targets))


def train(model: TileClassifier, tiles: LabelledTiles, options: LoraOptions, accelerator: Accelerator) -> list[float]:
    """The mean loss of each epoch; trains adapter and head in place. Raises UserError when it is not finite."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=options.learning_rate, weight_decay=options.weight_decay)
    dataset = TileDataset(tiles, random_view(model.encoder.size))
    loader = DataLoader(dataset, options.batch_size, shuffle=True, num_workers=options.workers)
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
    dataset = TileDataset(tiles, plain_view(model.encoder.size))
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


def save_release(model: nn.Module, encoder: Encoder, folder: Path, card: str | None = None) -> None:
    """Writes the model with the image processor of `encoder`, and a card, into `folder`, whole or not at all."""
    processor = release_processor(
        tile_size=encoder.size,
        mpp=encoder.mpp,
        mean=list(encoder.mean),
        std=list(encoder.std),
        pooling=encoder.pooling,
    )
    with atomic_directory(folder) as unfinished:
        write_release(model, processor, unfinished, card)


def save_models(
    model: TileClassifier, classes: Sequence[str], out: Path, card: Callable[[str], str] | None = None
) -> None:
    """Writes adapter/, merged/ and classifier/. Afterwards `model` has its adapter merged.

    Args:
        card: gives the text of a card for each `form` that `adapter_card` knows; no cards are written when None.
    """
    encoder, card_of = model.encoder, card or (lambda form: None)
    save_release(model.model, encoder, out / "adapter", card_of("adapter"))
    model.model = model.model.merge_and_unload()
    is_vit = model.model.config.model_type == "vit"
    save_release(release_model(model.model) if is_vit else model.model, encoder, out / "merged", card_of("merged"))
    if is_vit and encoder.pooling == "cls":
        classifier = vit_classifier(model.model, model.head, classes)
        save_release(classifier, encoder, out / "classifier", card_of("classifier"))
        return
    # No class of transformers pools in another way, so the head is saved alone, to put on the features of merged/.
    with atomic_directory(out / "classifier") as unfinished:
        save_file(model.head.state_dict(), unfinished / "head.safetensors", {"classes": json.dumps(list(classes))})
        if card is not None:
            write_card(unfinished, card_of("head"))


def sure(groups: Sequence[str], correct: np.ndarray) -> dict[str, float] | None:
    """The accuracy with its interval when whole groups are resampled; None when there is only one group."""
    return asdict(accuracy_interval(groups, correct, seed=0)) if len(set(groups)) > 1 else None


def prediction_table(tiles: LabelledTiles, probabilities: np.ndarray) -> pd.DataFrame:
    """One row for each tile: path, group, true and predicted class, and the probability of each class."""
    names = np.array(tiles.classes)
    known = {"path": tiles.paths, "group": tiles.groups, "class": names[tiles.labels]}
    columns = {f"prob_{name}": probabilities[:, index] for index, name in enumerate(names)}
    return pd.DataFrame({**known, "predicted": names[probabilities.argmax(axis=1)], **columns})


def main(argv: Sequence[str] | None = None) -> None:
    options, asked = parse_config(LoraOptions, CardOptions, argv=argv)
    accelerator, out, began = start(cpu=options.cpu, seed=options.seed), Path(options.out), time.monotonic()
    tiles = read_tiles(options)
    train_tiles, val_tiles = tiles.subset("train"), tiles.subset("val")
    encoder = load_for(tiles, options.encoder)

    # Colour comes first because it decodes every tile: a damaged one is named before anything is trained.
    colour = logistic_probe(colour_numbers(train_tiles), train_tiles.labels, colour_numbers(val_tiles))
    model = TileClassifier(add_lora(encoder.model, options), encoder, len(tiles.classes))
    # An adapter starts as the identity, so these are the features of the frozen encoder.
    (_, train_x), (_, val_x) = (predict(model, part, options, accelerator) for part in (train_tiles, val_tiles))
    frozen = logistic_probe(train_x, train_tiles.labels, val_x)
    losses = train(model, train_tiles, options, accelerator)
    adapted, _ = predict(model, val_tiles, options, accelerator)

    if accelerator.is_main_process:
        metric = load_metric("classification")
        ways = {"colour_regression": colour, "frozen_probe": frozen, "lora": adapted}
        scores = {way: metric.compute(predictions=found, references=val_tiles.labels) for way, found in ways.items()}
        right = {way: found.argmax(axis=1) == val_tiles.labels for way, found in ways.items()}
        facts = {"classes": tiles.classes, "train_tiles": len(train_tiles), "val_tiles": len(val_tiles)}
        facts |= {"val_groups": len(set(val_tiles.groups)), "encoder_revision": encoder.revision}
        facts |= {"options": asdict(options), "losses": losses}
        facts |= {"accuracy_intervals": {way: sure(val_tiles.groups, correct) for way, correct in right.items()}}
        facts |= {"seconds": time.monotonic() - began, "machine": machine_of(accelerator)}
        metrics = {**scores, **facts}
        card = partial(
            adapter_card,
            metrics,
            base=Base(encoder.name, encoder.revision),
            width=model.head.in_features,
            pooling=encoder.pooling,
            prefix_tokens=encoder.prefix_tokens,
            mpp=encoder.mpp,
            tile_size=encoder.size,
            cost=cost_of_seconds(metrics["seconds"], metrics["machine"], out, asked),
            licence=asked.licence,
        )
        save_models(model, tiles.classes, out, lambda form: card(form=form))
        with atomic_path(out / "predictions.csv") as unfinished:
            prediction_table(val_tiles, adapted).to_csv(unfinished, index=False)
        write_json(out / "metrics.json", metrics)
        print(pd.DataFrame(scores).T.round(3).to_string())
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_recipe(main)
