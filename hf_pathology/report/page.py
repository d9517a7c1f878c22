"""One self-contained HTML page of sections, figures, tables and commands."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from jinja2 import Environment, StrictUndefined

from ..atomic import atomic_path


Width = Literal["full", "half", "small"]


@dataclass(frozen=True)
class Picture:
    """A picture with its caption.

    Attributes:
        uri: the image as a data URI (`images.py`).
        caption: what is seen and how to read it.
        title: a few words before the caption.
        width: "full" of the page, "half", or "small" for a gallery; neighbours of one width stand side by side.
        alt: for those who do not see it; the caption when empty.
    """

    uri: str
    caption: str
    title: str = ""
    width: Width = "full"
    alt: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first columns are text and whose others are numbers, aligned to the right.

    Attributes:
        columns: their titles.
        rows: one cell of text for each column.
        caption: what the numbers are.
        text_columns: how many columns are text.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    text_columns: int = 1


@dataclass(frozen=True)
class KeyNumber:
    """A number that sums the report up, with the words that say what it is."""

    value: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """A part of the page; what is empty is left out.

    Attributes:
        title: also stands in the table of contents.
        text: paragraphs, separated by blank lines.
        problems: what could not be done, one message each.
        commands: as typed in a shell.
    """

    title: str
    text: str = ""
    figures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    problems: Sequence[str] = ()
    commands: Sequence[str] = ()


def write_report(
    path: str | Path, title: str, lead: str, sections: Sequence[Section], *, numbers: Sequence[KeyNumber] = ()
) -> None:
    """Writes the page to `path`, whole or not at all. It needs no other file and no network; all text is escaped.

    Args:
        lead: what was done and what came out of it, in a sentence or two.
        numbers: shown large below the lead.
    """
    page = render(title, lead, sections, numbers)
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8")


def render(title: str, lead: str, sections: Sequence[Section], numbers: Sequence[KeyNumber] = ()) -> str:
    """The page as HTML. Raises ValueError for a picture that is not a data URI."""
    for picture in (picture for section in sections for picture in section.figures):
        if not picture.uri.startswith("data:image/"):
            raise ValueError(f"a picture of a page is a data URI, not {picture.uri[:60]!r}")
    template, style = (
        files(__package__).joinpath(name).read_text("utf-8") for name in ("page.html.j2", "page.css.j2")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title, lead=lead, numbers=numbers, sections=sections, style=style, runs=runs_of_width
    )


def runs_of_width(pictures: Sequence[Picture]) -> list[tuple[Width, list[Picture]]]:
    """Neighbouring pictures of one width put together, in order."""
    runs: list[tuple[Width, list[Picture]]] = []
    for picture in pictures:
        if not runs or runs[-1][0] != picture.width:
            runs.append((picture.width, []))
        runs[-1][1].append(picture)
    return runs
