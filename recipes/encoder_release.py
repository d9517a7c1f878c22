"""The last paragraph of every pretraining recipe: the encoder as it is now, written as a release with its card."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_pathology.errors import UserError
from hf_pathology.features.encoder import revision_of
from hf_pathology.hub_upload.cards.card import Base, CardOptions
from hf_pathology.hub_upload.cards.encoder_cards import encoder_card
from hf_pathology.hub_upload.cards.run_facts import read_run
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.modeling.trunk import has_class_token, trunk_width
from hf_pathology.recipes.slide_data import TileData
from hf_pathology.tiles.views import ViewOptions
from hf_pathology.training.config import write_config
from hf_pathology.training.options import TrainingOptions


@dataclass
class EncoderRelease:
    """Writes the encoder of a run into a folder, whenever it is called.

    Attributes:
        method: name of the pretraining method, for the card.
        encoder: gives the encoder as it is at the time.
        views, config, cohort, training: what the run was made with.
        card: what is to be said of licence and energy.
        out: folder of the run, where its records are, and `config.yaml` with all options.
        options: all of them, as they were parsed.
    """

    method: str
    encoder: Callable[[], PreTrainedModel]
    views: ViewOptions
    config: dict[str, Any]
    cohort: TileData
    training: TrainingOptions
    card: CardOptions
    out: Path
    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        self.base = base_of(self.config)  # now, while it lies where it was found

    def __call__(self, folder: Path) -> None:
        write_config(self.out / "config.yaml", *self.options)
        encoder = self.encoder()
        pooling = "cls" if has_class_token(encoder) else "gap"
        export_encoder(
            encoder,
            folder,
            tile_size=self.views.global_size,
            mpp=self.config["mpp"],
            mean=self.views.mean,
            std=self.views.std,
            pooling=pooling,
            card=encoder_card(
                method=self.method,
                encoder=encoder,
                width=trunk_width(encoder.config),
                pooling=pooling,
                config=self.config,
                run=read_run(
                    self.out,
                    done=steps_done(folder, self.training.steps),
                    planned=self.training.steps,
                    card=self.card,
                    config=self.config,
                ),
                cohort=self.cohort,
                base=self.base,
            ),
        )


def base_of(config: dict[str, Any]) -> Base | None:
    """The release from which the training of this configuration started, if from one."""
    place = config.get("encoder")
    return None if place is None else Base(place, revision_of(place))


def steps_done(folder: Path, planned: int) -> int:
    """How many steps the encoder that is written to `folder` was trained: on the way the folder is named by them."""
    on_the_way = re.fullmatch(r"step_(\d+)", folder.name)
    return int(on_the_way[1]) if on_the_way else planned


def end_run(release: EncoderRelease, accelerator: Any) -> None:
    """Writes OUT/encoder and ends the run. Raises UserError when some of the slides had been left out."""
    if accelerator.is_main_process:
        release(release.out / "encoder")
        accelerator.print(f"encoder: {release.out / 'encoder'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if release.cohort.problems:
        raise UserError(
            f"{len(release.cohort.problems)} could not be used, see above; the encoder was trained on the others"
        )
