"""What a run leaves beside its encoder, for a release that shows how it came about: weights of student, teacher and heads, log, options."""

import json
from pathlib import Path

from hf_pathology.errors import UserError
from hf_pathology.training.checkpoint import step_folders
from hf_pathology.training.integrity import INDEX, damage


def files_of_run(encoder: Path) -> dict[str, Path | bytes]:
    """The files of the run whose release is `encoder`, by their path in a repository.

    Of the last checkpoint its weights and its index, which holds every option; what the optimizer and the random generators need is
    of pickles, and stays. Raises UserError when `encoder` is not in the folder of a run, or the checkpoint is damaged.
    """
    run = encoder.resolve().parent
    checkpoints = step_folders(run / "checkpoints")
    if not checkpoints or not (run / "log.jsonl").is_file():
        raise UserError(f"{run} is no folder of a run, with checkpoints and log.jsonl: leave out --with-training")
    last = checkpoints[-1]
    if what := damage(last):
        raise UserError(f"{last} is damaged ({what}): leave out --with-training")
    weights = sorted(last.glob("model*.safetensors*"))
    index = json.loads((last / INDEX).read_text(encoding="utf-8"))
    options = {name: index[name] for name in ("step", "config", "spent", "world_size", "device") if name in index}
    return {
        "training/log.jsonl": run / "log.jsonl",
        "training/options.json": (json.dumps(options, indent=2, ensure_ascii=False) + "\n").encode(),
        **{f"training/{path.name}": path for path in weights},
    }
