"""One skeleton for all cards, filled by a template for each kind, and completed by what is known only once files are written.

A card is rendered here by Jinja and then read by huggingface_hub's `ModelCard` or `DatasetCard`, which check its metadata:
their own `from_template` renders a single text, in which no template can extend another.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_pathology.atomic import atomic_path
from hf_pathology.errors import UserError
from hf_pathology.hub_upload.cards.cost import Cost, EnergyOptions
from hf_pathology.hub_upload.cards.evaluations import Evaluation
from hf_pathology.hub_upload.cards.names import is_hub_id, public_name, without_paths
from hf_pathology.version import __version__


NOT_RECORDED = "not recorded"
WEIGHTS, TRAINING_RECORD = "weights", "training record"  # what is filled into a card once the files are there


@dataclass
class CardOptions(EnergyOptions):
    """What a card is to say that no record of a run can know; nothing of it decides the result.

    Attributes:
        licence: the Hub's identifier, such as apache-2.0 or cc-by-nc-4.0; the card says so when none is stated.
        energy_kwh, carbon_intensity: see `EnergyOptions`.
    """

    licence: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_licence(self.licence)


def check_licence(licence: str | None) -> None:
    """Raises UserError for a licence that cannot be one of the Hub's identifiers."""
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise UserError(f"licence is {licence!r}: give the Hub's identifier, such as apache-2.0 or cc-by-nc-4.0")


@dataclass(frozen=True)
class Base:
    """What a release is made from, a Hub id or a directory, and what identifies its weights."""

    place: str
    revision: str | None = None

    @property
    def name(self) -> str:
        """Without where it lies."""
        return public_name(self.place)


@dataclass(frozen=True)
class Facts:
    """What the skeleton says of every release; what is None or empty was not recorded, and the card says so.

    Attributes:
        title: the first heading.
        licence: identifier.
        bases: what it was made from.
        steps: how it was made, in words, beside the options.
        options: every option that decided the result.
        cost: of the run.
        evaluations: each with its interval.
        provenance: further lines by their names.
        papers: titles of the method's papers, with their arXiv numbers.
    """

    title: str
    licence: str | None = None
    bases: Sequence[Base] = ()
    steps: Sequence[str] = ()
    options: Mapping[str, Any] | None = None
    cost: Cost | None = None
    evaluations: Sequence[Evaluation] = ()
    provenance: Mapping[str, Any] | None = None
    papers: Sequence[tuple[str, str]] = ()

    def hub_bases(self) -> list[str] | None:
        """The bases that are on the Hub, for the metadata; None when there is none."""
        return [base.place for base in self.bases if is_hub_id(base.place)] or None


def render_card(
    kind: str,
    data: ModelCardData | DatasetCardData,
    facts: Facts,
    *,
    templates: Iterable[str | Path] = (),
    **more: Any,
) -> str:
    """The card of this kind, Markdown with its metadata.

    Args:
        kind: name of a template, `<kind>.md.j2`, which extends `card.md.j2` and fills blocks of it.
        data: the metadata.
        facts: for the skeleton.
        templates: folders in which templates are looked for before `model_cards/`.
        more: what the blocks of this kind need; a name that they ask for and that is not given is an error.

    Raises ValueError when the metadata is none that the Hub's library reads.
    """
    folders = [*map(str, templates), str(files("hf_pathology.model_cards"))]
    environment = Environment(
        loader=FileSystemLoader(folders),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"known": known, "code": code, "number": number, "cell": cell}
    text = environment.get_template(f"{kind}.md.j2").render(
        metadata=data.to_yaml(line_break="\n"),
        facts=facts,
        options=without_paths(facts.options) if facts.options else None,
        version=__version__,
        weights_mark=mark(WEIGHTS, "- SHA-256 of the weights: not recorded"),
        training_mark=mark(TRAINING_RECORD, ""),
        **more,
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    card = (DatasetCard if isinstance(data, DatasetCardData) else ModelCard)(text)
    return str(card)


def known(value: Any, unit: str = "") -> str:
    """The value with its unit; what is missing is said to be."""
    return NOT_RECORDED if value is None or value == "" else f"{value}{unit and ' ' + unit}"


def code(value: Any) -> str:
    """The value as code, or that it is missing."""
    return NOT_RECORDED if value is None or value == "" else "`{}`".format(str(value).replace("`", "'"))


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits and no exponent, or that it is missing."""
    if value is None or value != value:
        return NOT_RECORDED
    if 0 < abs(value) < 10**-digits:
        return f"less than {10**-digits:.{digits}f}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def cell(value: Any) -> str:
    """The value within a table, whose columns and rows it does not break."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")


def mark(name: str, lines: str) -> str:
    """The `lines` between two comments by which they are found again."""
    return f"<!-- {name} -->\n{lines}{lines and chr(10)}<!-- end of {name} -->"


def fill_in(card: str, name: str, lines: str) -> str:
    """The card with `lines` at the mark `name`, in the place of what was there; at the end of a card without the mark."""
    pattern = rf"<!-- {name} -->\n.*?<!-- end of {name} -->"
    if re.search(pattern, card, re.DOTALL) is None:
        return f"{card.rstrip()}\n\n{mark(name, lines)}\n"
    return re.sub(pattern, lambda _: mark(name, lines), card, flags=re.DOTALL)


def write_card(folder: Path, card: str) -> None:
    """Writes the text of a `card` as README.md of the release in `folder`, with the SHA-256 of the weights that lie there.

    A card that was not made here has no mark for them, and is written as it is.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if weights and f"<!-- {WEIGHTS} -->" in card:
        card = fill_in(
            card, WEIGHTS, "\n".join(f"- SHA-256 of `{file.name}`: `{sha256_of(file)}`" for file in weights)
        )
    with atomic_path(folder / "README.md") as partial:
        partial.write_text(card, encoding="utf-8")


def sha256_of(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
