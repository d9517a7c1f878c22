"""The heads that classify slides by their features, made for a folder of features, and saved so that they load anywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, PreTrainedModel

from hf_pathology.atomic import atomic_directory
from hf_pathology.errors import UserError
from hf_pathology.features.store import SlideFeatures
from hf_pathology.hub_upload.cards.card import write_card
from hf_pathology.hub_upload.cards.head_cards import head_card
from hf_pathology.hub_upload.cards.names import public_name
from hf_pathology.hub_upload.export import write_fingerprint
from hf_pathology.modeling.configuration_abmil import AbmilConfig
from hf_pathology.modeling.configuration_deep_attn_misl import DeepAttnMislConfig
from hf_pathology.modeling.configuration_deep_graph_conv import DeepGraphConvConfig
from hf_pathology.modeling.configuration_dsmil import DsmilConfig
from hf_pathology.modeling.configuration_hipt_slide import HiptSlideConfig
from hf_pathology.modeling.modeling_abmil import AbmilForSlideClassification
from hf_pathology.modeling.modeling_deep_attn_misl import DeepAttnMislForSlideClassification
from hf_pathology.modeling.modeling_deep_graph_conv import DeepGraphConvForSlideClassification
from hf_pathology.modeling.modeling_dsmil import DsmilForSlideClassification
from hf_pathology.modeling.modeling_hipt import HiptModel, HiptRegionModel
from hf_pathology.modeling.modeling_hipt_slide import HiptForSlideClassification


OVER_TILES = {
    "abmil": (AbmilConfig, AbmilForSlideClassification),
    "dsmil": (DsmilConfig, DsmilForSlideClassification),
    "deep_attn_misl": (DeepAttnMislConfig, DeepAttnMislForSlideClassification),
    "deep_graph_conv": (DeepGraphConvConfig, DeepGraphConvForSlideClassification),
}
TILES_TO_CLUSTER = 1000  # of each bag
HEADS = (*OVER_TILES, "hipt", "hipt_attention")


@dataclass(frozen=True)
class HeadOptions:
    """Which head.

    Over tiles, whatever regions they are in: "abmil" is gated attention, "dsmil" has attention for each class to tiles like
    its most telling one, "deep_attn_misl" has layers for each kind of tile, "deep_graph_conv" convolutions over a graph of
    similar tiles. "hipt" is HIPT's: over features of tiles that
    were made with `embed --regions`, a transformer over the tiles of a region and another over the regions; over those of
    regions (`region_level`), the second alone. "hipt_attention" is gated attention over tiles, then over regions.
    """

    head: Literal["abmil", "dsmil", "deep_attn_misl", "deep_graph_conv", "hipt", "hipt_attention"] = field(
        default="abmil", metadata={"help": "a head over tiles, by its paper's name, or HIPT's over regions"}
    )
    region_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or directory of the hierarchy with whose second level hipt starts; random by default"
        },
    )
    freeze_regions: bool = field(default=False, metadata={"help": "leave that second level as it is"})

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise UserError(f"head is {self.head!r}: choose one of {', '.join(HEADS)}")
        if self.region_encoder is not None and self.head != "hipt":
            raise UserError(f"the head {self.head} has no second level to start with: leave out region_encoder")
        if self.freeze_regions and self.region_encoder is None:
            raise UserError("freeze_regions would leave random weights as they are: pass region_encoder")


def region_tiles_of(options: HeadOptions, bag: SlideFeatures) -> int:
    """How many tiles of such bags the head takes for one region; 1 when it is over tiles, or over features of regions.

    Raises UserError when the bag has no regions where the head needs them.
    """
    if options.head in OVER_TILES or (options.head == "hipt" and bag.pooling == "region"):
        return 1
    if bag.region == 1:
        raise UserError(
            f"{bag.slide} has features of single tiles, and the head {options.head} is over regions: embed with --regions"
        )
    return bag.region**2


def new_head(
    options: HeadOptions, bag: SlideFeatures, tiles: Sequence[torch.Tensor], classes: list[str]
) -> PreTrainedModel:
    """An untrained head for features like those of `bag`, that standardises them by mean and deviation of `tiles`.

    HistoSSLscaling does not standardise. We do because encoders differ in scale by orders of magnitude, and one
    learning rate has to be fair to all that are compared, a baseline of mean colours included: from 0 to 255 those reach
    an AUC of 0.91 standardised and 0.56 as they are, in a cohort drawn for the purpose. On the MUSK1 and Elephant bags
    there is no difference beyond the intervals. A second level that was trained before gets them as it knows them.
    """
    common = {
        "input_dim": bag.features.shape[1],
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
        "problem_type": "single_label_classification",
        "encoder": public_name(bag.encoder),  # the head may be published; its revision tells the weights
        "encoder_revision": bag.revision,
        "pooling": bag.pooling,
        "mpp": bag.mpp,
        "tile_size": bag.size,
    }
    if options.head in OVER_TILES:
        config, model = OVER_TILES[options.head]
        head = model(config(**common))
    else:
        head = hipt_head(options, bag, common)
    if options.region_encoder is None:
        scaler = StandardScaler()
        for rows in readable_rows(tiles):
            scaler.partial_fit(rows.numpy())
        head.feature_mean.copy_(torch.from_numpy(scaler.mean_))
        head.feature_std.copy_(torch.from_numpy(scaler.scale_))  # 1 where a feature is constant
    if isinstance(head, DeepAttnMislForSlideClassification):
        head.cluster_centres.copy_(cluster_centres(head, tiles))
    return head


def readable_rows(tiles: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The features (n, D) of the tiles of each bag that could be read, without their regions."""
    for bag_tiles in tiles:
        rows = bag_tiles.flatten(0, -2)
        yield rows[rows.isfinite().all(dim=1)]


def cluster_centres(head: DeepAttnMislForSlideClassification, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
    """Centres float32 (K, D) of kinds of tiles that are the same for all slides, by k-means on standardised features.

    Of each bag as many tiles count, so that a large slide has no kinds of its own. The seed is drawn by torch's generator.
    """
    drawn = [rows[torch.randperm(len(rows))[:TILES_TO_CLUSTER]] for rows in readable_rows(tiles)]
    rows = (torch.cat(drawn) - head.feature_mean) / head.feature_std
    clusters, seed = head.config.num_clusters, int(torch.randint(2**31, ()))
    if len(rows) < clusters:
        raise UserError(f"{len(rows)} tiles in all make no {clusters} clusters: use another head")
    return torch.from_numpy(MiniBatchKMeans(clusters, random_state=seed, n_init=3).fit(rows.numpy()).cluster_centers_)


def hipt_head(options: HeadOptions, bag: SlideFeatures, common: dict[str, Any]) -> HiptForSlideClassification:
    """HIPT's head, with the weights of a second level that was trained before where there is one."""
    tiles = region_tiles_of(options, bag)
    local = "attention" if options.head == "hipt_attention" else "transformer"
    if options.region_encoder is None:
        region = {"grid_size": bag.region} if tiles > 1 and local == "transformer" else None
        return HiptForSlideClassification(
            HiptSlideConfig(region_tiles=tiles, local=local, region_config=region, **common)
        )
    if tiles == 1:
        raise UserError(
            f"{bag.slide} has features of regions, which need no second level: leave out region_encoder, or pass those of tiles"
        )
    encoder = load_region_encoder(options.region_encoder, bag)
    heads = 3 if encoder.config.hidden_size % 3 == 0 else encoder.config.num_attention_heads  # published are 3
    config = HiptSlideConfig(
        region_tiles=tiles,
        region_config=encoder.config,
        freeze_regions=options.freeze_regions,
        num_attention_heads=heads,
        **common,
    )
    head = HiptForSlideClassification(config)
    head.regions.encoder.load_state_dict(encoder.state_dict())
    return head


def load_region_encoder(name: str, bag: SlideFeatures) -> HiptRegionModel:
    """The second level of a hierarchy, or one that was released alone. Raises UserError when it does not fit the bag."""
    try:
        model = AutoModel.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded as a hierarchy ({str(error).splitlines()[0]})") from error
    if isinstance(model, HiptModel):
        if model.config.tile_revision not in (None, bag.revision):
            raise UserError(
                f"the second level of {name} is for features by revision {model.config.tile_revision}, and those of "
                f"{bag.slide} are by {bag.encoder}, revision {bag.revision}: embed the slides with its first level"
            )
        model = model.region_encoder
    if not isinstance(model, HiptRegionModel):
        raise UserError(f"{name} is a {model.config.model_type}, no hierarchy: pass what `pretrain_hipt4k.py` made")
    if model.config.input_size != bag.features.shape[1]:
        raise UserError(
            f"{name} takes features of length {model.config.input_size}, and those of {bag.slide} have "
            f"{bag.features.shape[1]}"
        )
    return model


def save_head(head: PreTrainedModel, folder: str | Path, card: str | None = None) -> None:
    """Writes weights, configuration, code, card and fingerprint of `head`, so that it also loads where this package is not installed.

    Args:
        card: its text; by default one that knows of the head only what its configuration says.
    """
    with atomic_directory(folder) as partial:
        head.save_pretrained(partial)
        write_card(partial, head_card(head) if card is None else card)
        write_fingerprint(partial)
