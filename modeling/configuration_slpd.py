"""Configuration of SLPD pretraining (Yu et al. 2023, arXiv 2307.08259)."""

from typing import Any

from transformers import PretrainedConfig

from .configuration_dino import DinoConfig


class SlpdConfig(DinoConfig):
    """DINO's numbers (see `DinoConfig`), and those of the prototypes of slides.

    Args:
        num_regions, num_slides: of the cohort; the clusters are kept with the weights.
        num_clusters: prototypes of a slide.
        num_neighbours: most similar slides, of whose prototypes one each is a target too.
        own_weight, neighbour_weight: of the losses towards the region's own prototype, and towards those of its slide's
            neighbours.
        original_artefacts: as in the published code, the n-th prototype is no target for the n-th view, and both losses
            share a centre, which each of them moves, within the step.
    """

    model_type = "slpd"

    def __init__(
        self,
        encoder_config: PretrainedConfig | dict[str, Any] | None = None,
        num_regions: int = 1,
        num_slides: int = 1,
        num_clusters: int = 4,
        num_neighbours: int = 1,
        own_weight: float = 1.0,
        neighbour_weight: float = 1.0,
        original_artefacts: bool = False,
        **kwargs,
    ):
        self.num_regions = num_regions
        self.num_slides = num_slides
        self.num_clusters = num_clusters
        self.num_neighbours = num_neighbours
        self.own_weight = own_weight
        self.neighbour_weight = neighbour_weight
        self.original_artefacts = original_artefacts
        super().__init__(encoder_config, **kwargs)
