"""A judge of the encoder in training, for every pretraining recipe: the nearest neighbours of labelled tiles."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedModel

from hf_pathology.errors import UserError
from hf_pathology.evaluation.tile_probe import TileJudge
from hf_pathology.modeling.trunk import trunk_tokens
from hf_pathology.tiles.folder import TileDataset, read_tile_folder, split_by_group
from hf_pathology.tiles.views import ViewOptions
from hf_pathology.training.options import TrainingOptions


@dataclass
class JudgeOptions:
    """What the encoder in training is judged by, every `judge_every` steps.

    Attributes:
        judge: folder of labelled tiles (class folders or a `manifest.csv`, see `read_tile_folder`), which are no part of the
            training. Neighbours of the tiles of split val are looked for in split train; without splits, groups are split.
        judge_k: neighbours that vote.
    """

    judge: str | None = None
    judge_k: int = 20


def make_judge(
    options: JudgeOptions, views: ViewOptions, training: TrainingOptions
) -> Callable[[PreTrainedModel], dict[str, float]] | None:
    """The judge that `options` name, or None; it reads its tiles when it is first asked, on the main process only.

    Raises UserError when the folder cannot be used, or judging has no time.
    """
    if options.judge is None:
        if training.judge_every:
            raise UserError("judge_every is set, but nothing to judge by: pass a folder of labelled tiles as --judge")
        return None
    if not training.judge_every:
        raise UserError("--judge is given, but not when: pass --judge_every, in steps")
    tiles = read_tile_folder(options.judge)
    tiles = tiles if tiles.splits is not None else split_by_group(tiles)
    known, asked = tiles.subset("train"), tiles.subset("val")
    if options.judge_k > len(known):
        raise UserError(f"judge_k is {options.judge_k}: {options.judge} has only {len(known)} tiles to look among")

    @cache
    def judge() -> TileJudge:
        return TileJudge(
            TileDataset(known),
            TileDataset(asked),
            lambda encoder, pixels: trunk_tokens(encoder, pixels)[0],
            groups=asked.groups,
            size=views.global_size,
            mean=views.mean,
            std=views.std,
            k=options.judge_k,
        )

    return lambda encoder: judge()(encoder)
