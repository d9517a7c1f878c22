"""`hf-pathology convert`: a published checkpoint becomes a release, and what was made of it is told."""

from pathlib import Path
from typing import Any

from hf_pathology.hub_upload.conversion.convert import Conversion, ConversionOptions
from hf_pathology.hub_upload.conversion.convert import convert as converted
from hf_pathology.hub_upload.conversion.export import require_free, write_conversion

from ..errors import UserError, require_at_least


SHOWN = 5  # names in a line
LOADERS = {
    "vit": "AutoModel.from_pretrained",
    "resnet": "AutoModel.from_pretrained",
    "mae": "ViTMAEForPreTraining.from_pretrained",
}


def convert(*, form: str, files: list[Path], out: Path, max_gb: float, dry_run: bool, **options: Any) -> int:
    """Converts `files` into a release in `out`; returns the exit code."""
    numbers = ("num_heads", "region_heads", "decoder_heads", "image_size")
    require_at_least(1, **{name: options[name] for name in numbers})
    for name, value in {"mpp": options["mpp"], "max_gb": max_gb}.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} is {value}: it must be a positive number")
    require_free(out)
    conversion = converted(form, files, ConversionOptions(**options, max_bytes=int(max_gb * 1e9)))
    for source in conversion.report["sources"]:
        print("\n".join(lines_of(source)))
    print(f"{'input':<12}{input_line(conversion)}")
    if dry_run:
        print(f"{'release':<12}nothing was written")
        return 0
    write_conversion(conversion, out)
    print(f"{'release':<12}{out}, with the account in conversion.json")
    loader = LOADERS.get(conversion.kind, "AutoModel.from_pretrained")
    print(f'{"to load it":<12}{loader}("{out}"){"" if conversion.kind in LOADERS else ", after import hf_pathology"}')
    return 0


def lines_of(source: dict[str, Any]) -> list[str]:
    """What became of one checkpoint, to be read."""
    files = [
        f"{each['file']}, {each['bytes'] / 1e6:,.1f} MB, sha256 {each['sha256'][:16]}" for each in source["files"]
    ]
    left_out = [f"{group} ({count})" for group, count in source["left_out"].items()]
    taken = (
        f"{source['network']}: {source['holds']}, {source['used']} tensors, {source['weights'] / 1e6:.1f} M weights"
    )
    lines = {
        "checkpoint": shortened(files),
        "taken": taken,
        "left out": ", ".join(left_out) or "nothing",
        "unexpected": shortened(source["unexpected"]) or "nothing",
        "missing": shortened(source["missing"]) or "nothing",
        "inferred": ", ".join(inferred(source["architecture"])),
    }
    return [f"{name:<12}{line}" for name, line in lines.items()]


def inferred(architecture: dict[str, Any]) -> list[str]:
    """What was inferred of an architecture, each with where it comes from if that is not its tensors."""
    return [
        f"{name.replace('_', ' ')} {value}"
        + (f" ({architecture[f'{name}_from']})" if f"{name}_from" in architecture else "")
        for name, value in architecture.items()
        if not name.endswith("_from")
    ]


def input_line(conversion: Conversion) -> str:
    """What the model takes."""
    report = conversion.report
    mpp = "unknown resolution (state it by --mpp)" if report["mpp"] is None else f"{report['mpp']} mpp"
    tiles = f"tiles of {report['tile_size']} px at {mpp}, statistics {report['statistics']}"
    if conversion.kind == "region":
        return f"grids of class tokens of {conversion.model.config.input_size} numbers, of {tiles}"
    if conversion.kind == "mae":
        return f"{tiles}; it hides patches, always: for training, not for features"
    return f"{tiles}, pooling {report['pooling']}"


def shortened(names: list[str]) -> str:
    """The first few of `names`, and how many there are beyond."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
