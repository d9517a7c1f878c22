"""The cohort: which slides there are, whose they are, and what is known of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd

from ..errors import UserError
from .reader import SUFFIXES, Slide


@dataclass(frozen=True)
class CohortSlide:
    """One row of a cohort.

    Attributes:
        key: path of the slide relative to the slide folder, with "/"; outputs are named after it, so slides of the same
            name in different folders do not collide.
        path: where the slide is.
        case: the patient; slides of one case are never split. The slide's key when the table does not say.
        label: class name, or None.
        split: "train", "test" ..., or None.
        mpp: microns per level-0 pixel that overrides the slide's own, or None.
        weight: how often its tiles are to be seen in training, compared with those of other slides (1).
    """

    key: str
    path: Path
    case: str
    label: str | None = None
    split: str | None = None
    mpp: float | None = None
    weight: float = 1.0

    def open(self) -> Slide:
        return Slide(self.path, self.mpp)


def find_slides(folder: str | Path, mpp: float | None = None) -> list[CohortSlide]:
    """All slides below `folder` (or the one slide that `folder` is), sorted by key.

    Raises UserError when there is none.
    """
    folder = Path(folder)
    if folder.is_file():
        return [CohortSlide(folder.name, folder, folder.name, mpp=mpp)]
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: pass a folder of slides")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if not paths:
        raise UserError(f"{folder} holds no slide: looked for {', '.join(sorted(SUFFIXES))} in it and below")
    keys = [path.relative_to(folder).as_posix() for path in paths]
    return [CohortSlide(key, path, key, mpp=mpp) for key, path in zip(keys, paths)]


def read_cohort(
    table: str | Path, folder: str | Path, mpp: float | None = None
) -> tuple[list[CohortSlide], list[str]]:
    """The slides that the CSV `table` names, found in `folder`, and one message for each that is not there.

    Columns: `slide` (path relative to `folder`, or its name with or without suffix when that is unique), and optionally
    `case`, `label`, `split`, `mpp`, `weight`. Raises UserError for a table without `slide`, or one that names a slide twice.
    """
    rows = read_table(table, required=("slide",))
    found = {slide.key: slide for slide in find_slides(folder, mpp)}
    key_of = slide_names(list(found))
    slides, missing = [], []
    for row in rows.to_dict("records"):
        slide = found.get(key_of.get(row["slide"], ""))
        if slide is None:
            missing.append(
                f"{row['slide']} is named in {table} but is not in {folder}: mend the table or add the file"
            )
            continue
        slides.append(
            CohortSlide(
                key=slide.key,
                path=slide.path,
                case=row.get("case") or slide.key,
                label=row.get("label") or None,
                split=row.get("split") or None,
                mpp=_positive_number(row.get("mpp"), f"{table}, slide {row['slide']}, column mpp") or slide.mpp,
                weight=_positive_number(row.get("weight"), f"{table}, slide {row['slide']}, column weight") or 1.0,
            )
        )
    twice = pd.Series([slide.key for slide in slides], dtype=str)
    if twice.duplicated().any():
        raise UserError(f"{table} names {twice[twice.duplicated()].iloc[0]} twice: keep one row for each slide")
    if not slides:
        raise UserError(f"{table} names no slide that is in {folder}")
    return slides, missing


def read_table(table: str | Path, required: Iterable[str]) -> pd.DataFrame:
    """The CSV at `table` with every cell as text, empty cells as "". Raises UserError when a required column is absent."""
    if not Path(table).is_file():
        raise UserError(f"{table} does not exist")
    try:
        rows = pd.read_csv(table, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{table} cannot be read as CSV ({error})") from error
    absent = [column for column in required if column not in rows.columns]
    if absent:
        raise UserError(f"{table} has no column {', '.join(absent)}: its columns are {', '.join(rows.columns)}")
    return rows


def slide_names(keys: Sequence[str]) -> dict[str, str]:
    """What a table may call slides, with their keys: the key, or the name with or without suffix where it is unique."""
    keys_of: dict[str, set[str]] = {}
    for key in keys:
        path = PurePosixPath(key)
        for name in (path.with_suffix("").as_posix(), path.name, path.stem):
            keys_of.setdefault(name, set()).add(key)
    return {name: found.pop() for name, found in keys_of.items() if len(found) == 1} | {key: key for key in keys}


def _positive_number(text: str | None, where: str) -> float | None:
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number > 0:
        raise UserError(f"{where}: {text!r} is not a positive number")
    return number
