"""Configuration of DeepAttnMISL (Yao et al. 2020, arXiv 2009.11169): clusters of tiles, each with layers of its own."""

from transformers import PretrainedConfig


class DeepAttnMislConfig(PretrainedConfig):
    """What a head over clusters of tiles is made of; the defaults are those of HIPT's comparison.

    The classes are transformers' own `id2label`, and `problem_type` decides the loss (see `slide_loss`).

    Args:
        input_dim: length D of a tile's feature vector.
        num_clusters: K, the same clusters for all slides.
        hidden_dim: width H of a tile and of a cluster.
        attention_dim: width of both branches of the gate, and of what the classifier sees.
        dropout: probability of dropout everywhere.
        encoder, encoder_revision, pooling: what made the features that the head was trained on, see `SlideFeatures`.
        mpp: microns per pixel of the tiles that the head was trained on.
        tile_size: their edge in pixels.
    """

    model_type = "deep_attn_misl"

    def __init__(
        self,
        input_dim: int = 384,
        num_clusters: int = 10,
        hidden_dim: int = 512,
        attention_dim: int = 256,
        dropout: float = 0.25,
        encoder: str | None = None,
        encoder_revision: str | None = None,
        pooling: str | None = None,
        mpp: float | None = None,
        tile_size: int | None = None,
        **kwargs,
    ):
        self.input_dim = input_dim
        self.num_clusters = num_clusters
        self.hidden_dim = hidden_dim
        self.attention_dim = attention_dim
        self.dropout = dropout
        self.encoder = encoder
        self.encoder_revision = encoder_revision
        self.pooling = pooling
        self.mpp = mpp
        self.tile_size = tile_size
        super().__init__(**kwargs)
