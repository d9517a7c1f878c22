"""Configuration of DeepGraphConv (Li et al. 2018, MICCAI) in the form of Patch-GCN's and HIPT's comparisons."""

from typing import Literal

from transformers import PretrainedConfig


class DeepGraphConvConfig(PretrainedConfig):
    """What a head over a graph of tiles is made of; the defaults are those of HIPT's comparison.

    The classes are transformers' own `id2label`, and `problem_type` decides the loss (see `slide_loss`).

    Args:
        input_dim: length D of a tile's feature vector.
        hidden_dim: width H of everything else.
        num_neighbours: from how many tiles each one hears.
        edges: nearest are those with the most similar features, "latent", or those that lie nearest, "spatial".
        dropout: probability of dropout everywhere.
        encoder, encoder_revision, pooling: what made the features that the head was trained on, see `SlideFeatures`.
        mpp: microns per pixel of the tiles that the head was trained on.
        tile_size: their edge in pixels.
    """

    model_type = "deep_graph_conv"

    def __init__(
        self,
        input_dim: int = 384,
        hidden_dim: int = 256,
        num_neighbours: int = 8,
        edges: Literal["latent", "spatial"] = "latent",
        dropout: float = 0.25,
        encoder: str | None = None,
        encoder_revision: str | None = None,
        pooling: str | None = None,
        mpp: float | None = None,
        tile_size: int | None = None,
        **kwargs,
    ):
        if edges not in ("latent", "spatial"):
            raise ValueError(f"edges is {edges!r}: it is 'latent' or 'spatial'")
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.num_neighbours = num_neighbours
        self.edges = edges
        self.dropout = dropout
        self.encoder = encoder
        self.encoder_revision = encoder_revision
        self.pooling = pooling
        self.mpp = mpp
        self.tile_size = tile_size
        super().__init__(**kwargs)
