"""Whether a checkpoint belongs to the run that is asked for: its options, their hash, and what to set when they differ."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from .options import TrainingOptions


def config_hash(config: dict[str, Any]) -> str:
    """Twelve characters that are the same for the same options."""
    return hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=6).hexdigest()


def require_same_run(
    path: Path, before: dict[str, Any], now: dict[str, Any], options: TrainingOptions, processes: int
) -> None:
    """Raises UserError when the options `now` are not those of the checkpoint at `path`; says how to give them back."""
    now = json.loads(json.dumps(now))  # as they would come back from a checkpoint
    absent = "not set"
    different = [key for key in sorted({*before, *now}) if before.get(key, absent) != now.get(key, absent)]
    if not different:
        return
    changes = ", ".join(f"{key} {before.get(key, absent)} -> {now.get(key, absent)}" for key in different)
    remedy = "give them back, or choose a new --out"
    if different == ["tiles_a_step"]:
        remedy = f"{_same_tiles_a_step(before['tiles_a_step'], options, processes)}, or choose a new --out"
    raise UserError(
        f"{path} belongs to a run with other options ({changes}; their hash {config_hash(before)} -> {config_hash(now)}): "
        f"{remedy}"
    )


def _same_tiles_a_step(tiles: int, options: TrainingOptions, processes: int) -> str:
    """What to set so that a step has `tiles` again."""
    each, rest = divmod(tiles, processes)
    if rest:
        return (
            f"{tiles} tiles a step cannot be shared equally by {processes} processes, take a number that divides them"
        )
    if each % options.batch_size == 0:
        wanted = f"--accumulation {each // options.batch_size}"
    elif each % options.accumulation == 0:
        wanted = f"--batch_size {each // options.accumulation}"
    else:
        wanted = f"--batch_size {each} --accumulation 1"
    return f"with {processes} process{'es' if processes > 1 else ''}, set {wanted} to have {tiles} tiles a step again"
