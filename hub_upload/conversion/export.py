"""Writes a converted model as a release, with the account of its conversion."""

from pathlib import Path

from hf_pathology.atomic import atomic_directory, write_json
from hf_pathology.errors import UserError
from hf_pathology.hub_upload.cards.card import write_card
from hf_pathology.hub_upload.cards.encoder_cards import converted_card
from hf_pathology.hub_upload.conversion.convert import Conversion
from hf_pathology.hub_upload.export import export_encoder, release_processor, write_fingerprint
from hf_pathology.hub_upload.export_hipt import export_hipt, export_region_encoder
from hf_pathology.modeling.trunk import trunk_width


REPORT = "conversion.json"
REGION = 16  # tiles along an edge of the regions of HIPT and SLPD


def write_conversion(conversion: Conversion, out: Path) -> None:
    """Writes the release to `out`. Raises UserError when something else is there, see `require_free`."""
    require_free(out)
    model, size, mpp = conversion.model, conversion.tile_size, conversion.report["mpp"]
    card = converted_card(
        format=conversion.report["format"],
        model=model,
        conversion=conversion.report,
        width=width_of(conversion),
        pooling=conversion.pooling or "none",
        mpp=mpp,
        tile_size=size,
    )
    pixels = {"mpp": mpp, "mean": conversion.mean, "std": conversion.std}
    with atomic_directory(out) as partial:
        if conversion.kind == "hierarchy":
            export_hipt(model, partial, region=REGION, card=card, **pixels)
        elif conversion.kind == "region":
            export_region_encoder(model, partial, card)
        elif conversion.kind == "mae":
            model.save_vit_mae(partial)
            processor = release_processor(tile_size=size, **pixels)
            del processor.pooling  # it hides patches, always: not for features
            processor.save_pretrained(partial)
            write_card(partial, card)
            write_fingerprint(partial)
        else:
            export_encoder(model, partial, tile_size=size, pooling=conversion.pooling, card=card, **pixels)
        write_json(partial / REPORT, conversion.report)


def require_free(out: Path) -> None:
    """Raises UserError when `out` is there and neither empty nor what an earlier conversion wrote, which is replaced."""
    if out.is_file():
        raise UserError(f"{out} is a file: pass a folder to write to")
    if out.is_dir() and any(out.iterdir()) and not (out / REPORT).is_file():
        raise UserError(f"{out} holds something else already: pass a folder that is new or empty")


def width_of(conversion: Conversion) -> int:
    """The length of the feature vectors."""
    config = conversion.model.config
    if conversion.kind == "hierarchy":
        return config.region_config.hidden_size
    return trunk_width(config.encoder_config if conversion.kind == "mae" else config)
