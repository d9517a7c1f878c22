"""From the files of a published checkpoint to a model of transformers, and an account of how it came about."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.conversion.checkpoint_formats import FORMATS, STATISTICS, format_named
from hf_pathology.hub_upload.conversion.checkpoint_keys import KINDS, TakenNetwork, Tensors, keep, take_network
from hf_pathology.hub_upload.conversion.foreign_checkpoint import MAX_BYTES, ForeignCheckpoint, open_checkpoint
from hf_pathology.hub_upload.conversion.hub_vit import hub_config, hub_keys, hub_weights, require_vit
from hf_pathology.hub_upload.conversion.notes import mae_notes, region_notes, resnet_notes, table_note, vit_notes
from hf_pathology.hub_upload.conversion.original_hipt import hierarchy_of, region_keys, whole_region_encoder
from hf_pathology.hub_upload.conversion.original_mae import mae_config, mae_keys, whole_mae
from hf_pathology.hub_upload.conversion.original_resnet import resnet_keys, whole_resnet
from hf_pathology.hub_upload.conversion.original_vit import vit_config, vit_keys, vit_weights, whole_vit
from hf_pathology.version import __version__


KEYS = {"vit": vit_keys, "hub_vit": hub_keys, "region": region_keys, "mae": mae_keys, "resnet": resnet_keys}
RESNET_SIZE = 224  # edge of the crops of SimCLR, MoCo and BYOL


@dataclass(frozen=True)
class ConversionOptions:
    """What is not in the tensors, or is to be other than the format has it.

    Attributes:
        student: take the format's other network.
        num_heads: of the ViT.
        region_heads: of the second level of a hierarchy.
        decoder_heads: of MAE's decoder.
        image_size: edge in pixels that the table of positions is made for, and the size of the tiles.
        statistics: of pixels, one of `checkpoint_formats.STATISTICS`.
        mpp: microns per pixel of the tiles that it was trained on, None when that is not known.
        max_bytes: that are read of one checkpoint.
    """

    student: bool = False
    num_heads: int | None = None
    region_heads: int | None = None
    decoder_heads: int | None = None
    image_size: int | None = None
    statistics: str | None = None
    mpp: float | None = None
    max_bytes: int = MAX_BYTES


@dataclass(frozen=True)
class Conversion:
    """A converted model.

    Attributes:
        model: in eval mode, on the CPU.
        kind: "vit", "resnet", "region" (the second level of a hierarchy), "hierarchy" or "mae".
        report: the account, which becomes `conversion.json`.
        tile_size: edge in pixels of the tiles that it takes.
        mean, std: of the channels, for pixels between 0 and 1.
        pooling: how its output becomes one vector, None where it is not for that.
    """

    model: PreTrainedModel
    kind: str
    report: dict[str, Any]
    tile_size: int
    mean: list[float]
    std: list[float]
    pooling: str | None


@dataclass(frozen=True)
class Part:
    """What one checkpoint became: a model of a kind, for tiles of a size, and the account of it."""

    kind: str
    model: PreTrainedModel
    tile_size: int
    account: dict[str, Any]


def convert(form: str, files: Sequence[Path], options: ConversionOptions) -> Conversion:
    """The model in `files`: one, or for HIPT and SLPD two, of the first and the second level in any order.

    Raises UserError for what cannot be converted as the format `form`; see also `open_checkpoint`, `take_network`, `keep`.
    """
    layout = format_named(form)
    statistics = options.statistics or layout.statistics
    if statistics not in STATISTICS:
        raise UserError(f"statistics is {statistics!r}: choose one of {', '.join(STATISTICS)}")
    mean, std = STATISTICS[statistics]
    if len(files) > (2 if "region" in layout.kinds else 1):
        raise UserError(f"{len(files)} checkpoints were given: only the two levels of hipt and slpd go together")
    parts = {part.kind: part for part in (convert_file(form, file, options) for file in files)}
    if len(parts) < len(files):
        raise UserError(f"{files[0]} and {files[1]} hold the same level: pass one of each, or one alone")
    if "region" not in parts:
        refuse(options, "what has no second level", "region_heads")
    if "region" in parts and len(parts) == 1:
        refuse(options, "a second level alone", "num_heads")
    kind, part = next(iter(parts.items()))
    model = part.model
    if len(parts) == 2:
        kind, part = "hierarchy", parts["vit"]
        model = hierarchy_of(part.model, parts["region"].model, mean, std)
    report = {
        "format": form,
        "model_type": "vit_mae" if kind == "mae" else model.config.model_type,
        "sources": [each.account for each in parts.values()],
        "statistics": statistics,
        "mean": mean,
        "std": std,
        "tile_size": part.tile_size,
        "mpp": options.mpp,
        "pooling": {"resnet": "gap", "mae": None}.get(kind, "cls"),
        "hf_pathology": __version__,
    }
    return Conversion(model, kind, report, part.tile_size, mean, std, report["pooling"])


def convert_file(form: str, file: Path, options: ConversionOptions) -> Part:
    """The model in one checkpoint, with the account of what was taken and what was not."""
    with open_checkpoint(file, options.max_bytes) as checkpoint:
        require_vit(checkpoint.config, file)
        taken = take_network(checkpoint.content, form, file, options.student)
        tensors = keep(taken, KEYS[taken.kind](taken.tensors), form, file)
        try:
            kind, model, tile_size, notes = built(taken, tensors, checkpoint, form, options)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        except (ValueError, TypeError, IndexError, RuntimeError) as error:  # what transformers says of odd shapes
            raise UserError(f"{file} has tensors whose shapes are not those of {KINDS[taken.kind][1]}") from error
        account = {
            "files": [
                {"file": each.name, "bytes": each.stat().st_size, "sha256": sha256(each)} for each in checkpoint.files
            ],
            "network": taken.name,
            "holds": KINDS[taken.kind][1],
            "used": len(tensors),
            "weights": sum(tensor.numel() for tensor in tensors.values()),
            "left_out": dict(sorted(taken.left_out.items())),
            "unexpected": sorted(taken.unexpected),
            "missing": [],
            "architecture": notes,
        }
        return Part(kind, model, tile_size, account)


def built(
    taken: TakenNetwork, tensors: Tensors, checkpoint: ForeignCheckpoint, form: str, options: ConversionOptions
) -> tuple[str, PreTrainedModel, int, dict[str, Any]]:
    """Kind, model, size of its tiles, and its architecture in words, of the `tensors` that were taken."""
    layout = FORMATS[form]
    if taken.kind == "resnet":
        refuse(options, "a ResNet", "num_heads", "decoder_heads")
        model = whole_resnet(tensors)
        return "resnet", model, options.image_size or RESNET_SIZE, resnet_notes(model.config)
    if taken.kind == "region":
        refuse(options, "a second level", "decoder_heads")
        model = whole_region_encoder(tensors, options.region_heads)
        return "region", model, options.image_size or layout.image_size, region_notes(model.config, options)
    if taken.kind == "mae":
        refuse(options, "an autoencoder", "image_size")
        config = mae_config(tensors, taken.settings, options.num_heads, options.decoder_heads)
        return (
            "mae",
            whole_mae(tensors, config),
            config.encoder_config.image_size,
            mae_notes(config, taken.settings, options),
        )
    refuse(options, "a ViT", "decoder_heads")
    if taken.kind == "hub_vit":
        weights = hub_weights(tensors)
        config = hub_config(weights, checkpoint.config, options.num_heads)
    else:
        weights, config = vit_weights(tensors), vit_config(tensors, options.num_heads)
    stored = config.image_size
    model = whole_vit(config, weights, options.image_size or layout.image_size, layout.dino_table)
    notes = {**vit_notes(config, options, checkpoint.config), "table": table_note(stored, config, layout.dino_table)}
    return "vit", model, config.image_size, notes


def refuse(options: ConversionOptions, what: str, *names: str) -> None:
    """Raises UserError when one of the options `names` is given, which `what` has no use for."""
    for name in names:
        if getattr(options, name) is not None:
            raise UserError(f"{what} has no use for --{name.replace('_', '-')}: leave it out")


def sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
