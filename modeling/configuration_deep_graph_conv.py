"""Configuration of DeepGraphConv (Li et al. 2018, MICCAI) in the form of Patch-GCN's and HIPT's comparisons."""

from typing import Literal

from .configuration_slide_head import SlideHeadConfig


class DeepGraphConvConfig(SlideHeadConfig):
    """What a head over a graph of tiles is made of; the defaults are those of HIPT's comparison.

    Args, beside those of `SlideHeadConfig`:
        hidden_dim: width H of everything else.
        num_neighbours: from how many tiles each one hears.
        edges: nearest are those with the most similar features, "latent", or those that lie nearest, "spatial".
        dropout: probability of dropout everywhere.
    """

    model_type = "deep_graph_conv"

    def __init__(
        self,
        input_dim: int = 384,
        hidden_dim: int = 256,
        num_neighbours: int = 8,
        edges: Literal["latent", "spatial"] = "latent",
        dropout: float = 0.25,
        **kwargs,
    ):
        if edges not in ("latent", "spatial"):
            raise ValueError(f"edges is {edges!r}: it is 'latent' or 'spatial'")
        self.hidden_dim = hidden_dim
        self.num_neighbours = num_neighbours
        self.edges = edges
        self.dropout = dropout
        super().__init__(input_dim=input_dim, **kwargs)
