"""Configuration of the dual-stream head (Li et al. 2021, arXiv 2011.08939)."""

from transformers import PretrainedConfig


class DsmilConfig(PretrainedConfig):
    """What a dual-stream head is made of; the defaults are those of HIPT's comparison.

    The classes are transformers' own `id2label`, and `problem_type` decides the loss (see `slide_loss`).

    Args:
        input_dim: length D of a tile's feature vector.
        query_dim: length of the queries by which tiles are compared with the critical one.
        dropout: probability of dropout before the values are made.
        encoder, encoder_revision, pooling: what made the features that the head was trained on, see `SlideFeatures`.
        mpp: microns per pixel of the tiles that the head was trained on.
        tile_size: their edge in pixels.
    """

    model_type = "dsmil"

    def __init__(
        self,
        input_dim: int = 384,
        query_dim: int = 128,
        dropout: float = 0.0,
        encoder: str | None = None,
        encoder_revision: str | None = None,
        pooling: str | None = None,
        mpp: float | None = None,
        tile_size: int | None = None,
        **kwargs,
    ):
        self.input_dim = input_dim
        self.query_dim = query_dim
        self.dropout = dropout
        self.encoder = encoder
        self.encoder_revision = encoder_revision
        self.pooling = pooling
        self.mpp = mpp
        self.tile_size = tile_size
        super().__init__(**kwargs)
