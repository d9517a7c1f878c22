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
from hf_pathology.features.pooling import Pooling, pool, pooling_of
from hf_pathology.modeling.modeling_tile_classifier import vit_classifier
from hf_pathology.tiles.folder import LabelledTiles, TileDataset, colour_numbers, read_tile_folder, split_by_group
from hf_pathology.training.config import parse_config


# The projections of the attention, under their names in transformers 5.9 and later, and in other encoders.
QUERY_AND_VALUE = r".*\.(q_proj|v_proj|query|value)"


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


def read_tiles(options: LoraOptions, encoder_mpp: float | None) -> LabelledTiles:
    """The labelled tiles with the split they state, or else one by group. Raises UserError at another resolution."""
    tiles = read_tile_folder(options.tiles, options.table, options.mpp)
    if None not in (tiles.mpp, encoder_mpp) and abs(tiles.mpp / encoder_mpp - 1) > 0.1:
        raise UserError(
            f"{options.encoder} is made for {encoder_mpp} mpp, the tiles have {tiles.mpp}: resize the tiles"
        )
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
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    crop = v2.RandomResizedCrop(size["height"], scale=(0.7, 1.0), ratio=(0.9, 1.1))  # mild: resolution means something
    dataset = TileDataset(tiles, partial(random_view, crop=crop))
    return DataLoader(dataset, options.batch_size, shuffle=True, num_workers=options.workers)


# Views to loss.


class TileClassifier(nn.Module):
    """An encoder (plain or with LoRA), the processor and pooling rule of its release, and one linear layer."""

    def __init__(self, encoder: nn.Module, processor: BaseImageProcessor, pooling: Pooling, classes: int):
        super().__init__()
        self.encoder, self.processor, self.pooling = encoder, processor, pooling
        self.prefix_tokens = 1 + getattr(encoder.config, "num_register_tokens", 0)
        self.head = nn.Linear(encoder.config.hidden_size * (2 if pooling == "cls+mean" else 1), classes)

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits (B, classes) and features (B, D) of uint8 tiles (B, 3, size, size)."""
        pixels = self.processor(images=tiles, do_resize=False, do_center_crop=False, return_tensors="pt")[
            "pixel_values"
        ]
        features = pool(self.encoder(pixels).last_hidden_state, self.pooling, self.prefix_tokens)
        return self.head(features), features


def load_release(encoder: str) -> tuple[nn.Module, BaseImageProcessor, Pooling]:
    """The encoder, its image processor and its pooling rule. Raises UserError when weights are missing."""
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
    return model, processor, pooling_of(getattr(processor, "pooling", None), encoder, model.config.model_type)


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


def save_processor(processor: BaseImageProcessor, folder: Path, mpp: float | None) -> None:
    """Writes the processor into `folder` with its `mpp`, also when that is None, which transformers leaves out."""
    processor.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    write_json(file, {**json.loads(file.read_text()), "mpp": mpp})


def save_models(model: TileClassifier, classes: Sequence[str], mpp: float | None, out: Path) -> nn.Module:
    """Writes adapter/, merged/ and classifier/ and returns the merged encoder; `model` has no adapter any more."""
    with atomic_directory(out / "adapter") as folder:
        model.encoder.save_pretrained(folder)
        save_processor(model.processor, folder, mpp)
    model.encoder = model.encoder.merge_and_unload()
    with atomic_directory(out / "merged") as folder:
        model.encoder.save_pretrained(folder)
        save_processor(model.processor, folder, mpp)
    with atomic_directory(out / "classifier") as folder:
        if model.encoder.config.model_type == "vit" and model.pooling == "cls":
            vit_classifier(model.encoder, model.head, classes).save_pretrained(folder)
            save_processor(model.processor, folder, mpp)
        else:
            # No class of transformers pools like this, so the head is saved alone, to put on the features of merged/.
            save_file(model.head.state_dict(), folder / "head.safetensors", {"classes": json.dumps(list(classes))})
    return model.encoder


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
    encoder, processor, pooling = load_release(options.encoder)
    encoder_mpp = getattr(processor, "mpp", None)
    tiles = read_tiles(options, encoder_mpp)
    train_tiles, val_tiles = tiles.subset("train"), tiles.subset("val")

    # Colour comes first because it decodes every tile: a damaged one is named before anything is trained.
    colour = probe(colour_numbers(train_tiles), train_tiles.labels, colour_numbers(val_tiles))
    model = TileClassifier(add_lora(encoder, options), processor, pooling, len(tiles.classes))
    # An adapter starts as the identity, so these are the features of the frozen encoder.
    (_, train_x), (_, val_x) = (predict(model, part, options, accelerator) for part in (train_tiles, val_tiles))
    frozen = probe(train_x, train_tiles.labels, val_x)
    losses = train(model, train_tiles, options, accelerator)
    adapted, _ = predict(model, val_tiles, options, accelerator)

    if accelerator.is_main_process:
        metric = load_metric("classification")
        ways = {"colour_regression": colour, "frozen_probe": frozen, "lora": adapted}
        scores = {way: metric.compute(predictions=found, references=val_tiles.labels) for way, found in ways.items()}
        save_models(model, tiles.classes, tiles.mpp if encoder_mpp is None else encoder_mpp, out)
        with atomic_path(out / "predictions.csv") as partial_file:
            prediction_table(val_tiles, adapted).to_csv(partial_file, index=False)
        facts = {"classes": tiles.classes, "train_tiles": len(train_tiles), "val_tiles": len(val_tiles)}
        write_json(out / "metrics.json", {**scores, "losses": losses, **facts, "options": asdict(options)})
        print(pd.DataFrame(scores).T.round(3).to_string())


if __name__ == "__main__":
    main()
