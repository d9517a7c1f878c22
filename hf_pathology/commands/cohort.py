"""The slides that a command was asked to work on."""

from pathlib import Path

from ..errors import require_at_least
from ..record import RunRecord
from ..slides.cohort import CohortSlide, find_slides, read_cohort


def chosen_slides(
    slides: Path, cohort: Path | None, slide_mpp: float | None, limit: int | None, record: RunRecord
) -> list[CohortSlide]:
    """The slides of the folder, or those that the cohort table names; what the table misses goes into `record`."""
    require_at_least(1, limit=limit)
    if cohort is None:
        return find_slides(slides, slide_mpp)[:limit]
    found, missing = read_cohort(cohort, slides, slide_mpp)
    for problem in missing:
        record.failed(problem)
    return found[:limit]
