"""TensorBoard, trackio and the other trackers of accelerate, beside the log of the run."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers

from ..errors import UserError
from .log import is_number


EXTRA = ("tensorboard", "trackio")  # what the extra `trackers` installs


def start_trackers(
    accelerator: Accelerator, names: list[str], out: Path, config: dict[str, Any], first_step: int
) -> None:
    """Makes `accelerator.log` reach the trackers `names`, which get the options of the run; files go to `out`/trackers.

    TensorBoard drops what it has of `first_step` and later steps; trackio keeps its own folder, on this machine unless it
    is told otherwise (TRACKIO_DIR). Raises UserError for a tracker that is not known or not
    installed.
    """
    if not names:
        return
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"trackers: {name} is not known; known are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            package = "'hf_pathology[trackers]'" if name in EXTRA else name
            raise UserError(f"trackers: {name} is not installed; run: pip install {package}")
    folder = Path(out) / "trackers"
    folder.mkdir(parents=True, exist_ok=True)
    accelerator.project_configuration.logging_dir = str(folder)
    accelerator.log_with = filter_trackers(names, str(folder))
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in config.items()
    }
    of_each = {
        "tensorboard": {"purge_step": first_step},
        "trackio": {"name": "run", "resume": "allow", "embed": False, "auto_log_cpu": False, "auto_log_gpu": False},
    }
    accelerator.init_trackers(Path(out).resolve().name, config=plain, init_kwargs=of_each)


def track(accelerator: Accelerator, record: dict[str, Any]) -> None:
    """Sends the numbers of `record` to the trackers, if there are any."""
    numbers = {name: value for name, value in record.items() if name != "step" and is_number(value)}
    accelerator.log(numbers, step=record["step"])
