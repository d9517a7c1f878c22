"""The last paragraph of every pretraining recipe: the encoder as it is now, written as a release with its card."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.cards import encoder_card
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.modeling.trunk import has_class_token, trunk_width
from hf_pathology.recipes.slide_data import TileData
from hf_pathology.tiles.views import ViewOptions
from hf_pathology.training.options import TrainingOptions


@dataclass
class EncoderRelease:
    """Writes the encoder of a run into a folder, whenever it is called.

    Attributes:
        method: name of the pretraining method, for the card.
        encoder: gives the encoder as it is at the time.
        views, config, cohort, training: what the run was made with.
        out: folder of the run, where its log is.
    """

    method: str
    encoder: Callable[[], PreTrainedModel]
    views: ViewOptions
    config: dict[str, Any]
    cohort: TileData
    training: TrainingOptions
    out: Path

    def __call__(self, folder: Path) -> None:
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
                log=self.out / "log.jsonl",
                cohort=self.cohort,
                training=self.training,
            ),
        )


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
