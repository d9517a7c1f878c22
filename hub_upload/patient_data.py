"""Looks for patients in what is about to be published: in names, texts, tables, weights, archives and pictures."""

import csv
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.lib import ArrowInvalid
from safetensors import SafetensorError, safe_open

from hf_pathology.hub_upload.identifiers import Finding, search_name, search_text, unique
from hf_pathology.hub_upload.image_metadata import search_image, search_picture


TEXTS = (
    ".md",
    ".txt",
    ".json",
    ".jsonl",
    ".yaml",
    ".yml",
    ".py",
    ".cfg",
    ".toml",
    ".ini",
    ".log",
    ".html",
    ".xml",
    ".geojson",
)
NAMES = ("license", "licence", "notice", "citation.cff", ".gitattributes", ".gitignore")
NAMING = re.compile(r"(?i)(?:^|_)(?:slide|case|patient|file|filename|path|specimen|accession|wsi)s?(?:$|_)")
TILES_LOOKED_AT = 64  # of each shard: its pictures come from one program


def search_file(file: str, source: Path | bytes) -> list[Finding]:
    """What a file that is released as `file` gives away; a kind of file that nobody can look into is an error.

    Args:
        source: where it lies, or its content.
    """
    name = Path(file).name
    findings = search_text(file, file) or search_name(file, name)
    if isinstance(source, bytes):
        return unique([*findings, *search_text(file, source.decode("utf-8", errors="replace"))])
    if (seen := search_image(file, source)) is not None:
        return unique([*findings, *seen])
    suffix = source.suffix.lower()
    if suffix in READERS:
        try:
            findings += READERS[suffix](file, source)
        except (ArrowInvalid, SafetensorError, tarfile.TarError, csv.Error, OSError, EOFError, ValueError) as error:
            findings.append(Finding("error", file, f"it cannot be read ({str(error).splitlines()[0]})"))
    elif suffix in TEXTS or name.lower() in NAMES or name.lower().startswith(NAMES[:3]):
        findings += search_text_file(file, source)
    else:
        findings.append(Finding("error", file, "a kind of file that cannot be looked into"))
    return unique(findings)


def search_text_file(file: str, path: Path) -> list[Finding]:
    """What stands in the lines of a text. Names of slides and cases are known by their keys where it is JSON."""
    findings: list[Finding] = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            findings += search_text(file, line)
    if path.suffix.lower() == ".json":
        try:
            findings += search_names(file, named_strings(json.loads(path.read_text(encoding="utf-8"))))
        except ValueError:
            findings.append(Finding("note", file, "no valid JSON"))
    return findings


def search_table(file: str, path: Path) -> list[Finding]:
    """What stands in the cells of a CSV or TSV file."""
    findings: list[Finding] = []
    with open(path, encoding="utf-8", errors="replace", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","):
            cells = [(str(name), str(value)) for name, value in row.items() if value]
            for name, value in cells:
                findings += search_text(file, f"{name}: {value}")
            findings += search_names(file, [value for name, value in cells if names_something(name)])
    return findings


def search_weights(file: str, path: Path) -> list[Finding]:
    """What the metadata of a safetensors file say, and the names of its tensors."""
    with safe_open(path, "np") as weights:
        told = json.dumps(weights.metadata() or {}, ensure_ascii=False)
        return search_text(file, told + "\n" + "\n".join(weights.keys()))


def search_parquet(file: str, path: Path) -> list[Finding]:
    """What stands in the columns of text of a Parquet file, and beside the pixels of its first pictures."""
    findings: list[Finding] = []
    with pq.ParquetFile(path) as table:
        schema = table.schema_arrow
        texts = [each.name for each in schema if pa.types.is_string(each.type) or pa.types.is_large_string(each.type)]
        for group in range(table.num_row_groups if texts else 0):
            columns = table.read_row_group(group, columns=texts)
            for name in texts:
                values = [value for value in columns[name].unique().to_pylist() if value]
                findings += search_text(file, "\n".join(values))
                findings += search_names(file, values if names_something(name) else [])
        pictures = [
            each.name for each in schema if pa.types.is_struct(each.type) and each.type.get_field_index("bytes") >= 0
        ]
        for name in pictures:
            rows = next(table.iter_batches(TILES_LOOKED_AT, columns=[name]), None)
            for value in [] if rows is None else rows[name].to_pylist():
                findings += search_picture(file, value["bytes"]) if value and value["bytes"] else []
                findings += search_text(file, (value or {}).get("path") or "")
    return unique(findings)


def search_archive(file: str, path: Path) -> list[Finding]:
    """What stands in the JSON of a WebDataset's samples and in their names, and beside the pixels of its first pictures."""
    findings: list[Finding] = []
    with tarfile.open(path) as archive:
        pictures = 0
        for member in archive:
            findings += search_text(file, member.name)
            content = archive.extractfile(member)
            if member.name.endswith(".json") and content:
                told = content.read()
                findings += search_text(file, told.decode("utf-8", errors="replace"))
                findings += search_names(file, named_strings(json.loads(told)))
            elif member.name.endswith((".jpg", ".png")) and content and pictures < TILES_LOOKED_AT:
                pictures += 1
                findings += search_picture(file, content.read())
            findings = unique(findings)
    return findings


READERS: dict[str, Callable[[str, Path], list[Finding]]] = {
    ".safetensors": search_weights,
    ".parquet": search_parquet,
    ".tar": search_archive,
    ".csv": search_table,
    ".tsv": search_table,
}


def search_names(file: str, names: Iterable[str]) -> list[Finding]:
    """What the names of slides and cases give away."""
    found = [finding for name in dict.fromkeys(names) for finding in search_name(file, Path(name).name)]
    return unique(found)


def names_something(column: str) -> bool:
    """Whether a column, or a key of JSON, holds names of slides, cases or files."""
    return NAMING.search(column) is not None


def named_strings(content: Any, key: str = "") -> Iterator[str]:
    """The strings of a JSON value that stand under a key which names a slide, a case or a file."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from named_strings(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from named_strings(value, key)
    elif isinstance(content, str) and names_something(key):
        yield content
