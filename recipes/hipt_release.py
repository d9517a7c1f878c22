"""The last paragraph of the recipes of the second level: both levels as one release, or the second alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pathology.errors import UserError
from hf_pathology.features.encoder import Encoder, load_encoder
from hf_pathology.features.exchange import UNKNOWN
from hf_pathology.features.region_blocks import RegionBlocks
from hf_pathology.hub_upload.cards.card import Base, CardOptions
from hf_pathology.hub_upload.cards.encoder_cards import hipt_card
from hf_pathology.hub_upload.cards.run_facts import read_run
from hf_pathology.hub_upload.export_hipt import export_hipt, export_region_encoder
from hf_pathology.modeling.configuration_hipt import HiptConfig
from hf_pathology.modeling.modeling_hipt import HiptModel, HiptRegionModel
from hf_pathology.recipes.encoder_release import base_of, steps_done
from hf_pathology.recipes.region_data import RegionCohort
from hf_pathology.training.config import write_config
from hf_pathology.training.options import TrainingOptions


@dataclass
class TileEncoderOptions:
    """What made the features of the tiles, which is released together with the region encoder.

    Attributes:
        tile_encoder: Hub id or directory of the encoder, where it is not what the features say; "none" to release the
            region encoder alone.
    """

    tile_encoder: str | None = None


def find_tile_encoder(options: TileEncoderOptions, regions: RegionBlocks) -> Encoder | None:
    """The encoder that made the features, or None when it is not to be released.

    Raises UserError when it cannot be had, has other weights by now, or its features are not its class tokens.
    """
    if options.tile_encoder == "none":
        return None
    remedy = "pass --tile_encoder none to release the region encoder alone"
    if regions.kind.pooling != "cls":
        raise UserError(
            f"the features are {regions.kind.pooling!r} of {regions.kind.encoder}, no class tokens: {remedy}"
        )
    try:
        encoder = load_encoder(options.tile_encoder or regions.kind.encoder, pooling="cls")
    except UserError as error:
        raise UserError(f"{error}; or {remedy}, or --tile_encoder DIR where it lies elsewhere") from error
    if regions.kind.revision not in (UNKNOWN, encoder.revision):
        raise UserError(
            f"{encoder.name} has the revision {encoder.revision}, and the features were made by {regions.kind.revision}: pass "
            f"the encoder that made them as --tile_encoder, or {remedy}"
        )
    if regions.kind.tile_size not in (None, encoder.size):
        raise UserError(
            f"the features are of tiles of {regions.kind.tile_size} px, resized to the {encoder.size} px of {encoder.name}, and a "
            f"hierarchy does not resize: embed with --size {encoder.size}, or {remedy}"
        )
    return encoder


@dataclass
class HiptRelease:
    """Writes the encoder of a run into a folder, whenever it is called.

    Attributes:
        method: name of the pretraining method, for the card.
        encoder: gives the region encoder as it is at the time.
        tiles: the encoder of the tiles, None to release the region encoder alone.
        config, cohort, training: what the run was made with.
        card: what is to be said of licence and energy.
        out: folder of the run, where its records are, and `config.yaml` with all options.
        options: all of them, as they were parsed.
    """

    method: str
    encoder: Callable[[], HiptRegionModel]
    tiles: Encoder | None
    config: dict[str, Any]
    cohort: RegionCohort
    training: TrainingOptions
    card: CardOptions
    out: Path
    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        self.base = base_of(self.config)  # now, while it lies where it was found

    def __call__(self, folder: Path) -> None:
        write_config(self.out / "config.yaml", *self.options)
        region_encoder, source, tiles = self.encoder(), self.cohort.source, self.tiles
        size, mpp = source.kind.tile_size, source.kind.mpp
        if tiles is not None:
            size, mpp = size or tiles.size, mpp or tiles.mpp
        config = {**self.config, "tile_size": size, "mpp": mpp}
        card = hipt_card(
            method=self.method,
            region_encoder=region_encoder,
            tiles=Base(source.kind.encoder if tiles is None else tiles.name, source.kind.revision),
            whole=tiles is not None,
            config=config,
            run=read_run(
                self.out,
                done=steps_done(folder, self.training.steps),
                planned=self.training.steps,
                card=self.card,
                config=config,
            ),
            regions=len(source),
            slides=len(source.slides),
            base=self.base,
        )
        if tiles is None:
            export_region_encoder(region_encoder, folder, card)
            return
        config = HiptConfig(
            tiles.model.config,
            region_encoder.config,
            tile_size=size,
            white=[(1 - mean) / std for mean, std in zip(tiles.mean, tiles.std)],
            tile_revision=tiles.revision,
        )
        model = HiptModel(config)
        weights = {name: weight for name, weight in tiles.model.state_dict().items() if not name.startswith("pooler.")}
        model.tile_encoder.load_state_dict(weights)
        model.region_encoder.load_state_dict(region_encoder.state_dict())
        export_hipt(
            model, folder, region=source.kind.grid, mpp=mpp, mean=list(tiles.mean), std=list(tiles.std), card=card
        )
