"""What the configurations of all slide classifiers say: which features the head takes, and what made them."""

from transformers import PretrainedConfig


class SlideHeadConfig(PretrainedConfig):
    """The part of a head's configuration that is the same for all.

    The classes are transformers' own `id2label`, and `problem_type` decides the loss (see `slide_loss`).

    Args:
        input_dim: length D of a feature vector, of a tile or of a region.
        encoder, encoder_revision, pooling: what made the features that the head was trained on, see `SlideFeatures`.
        mpp: microns per pixel of the tiles that the head was trained on.
        tile_size: their edge in pixels.
    """

    def __init__(
        self,
        input_dim: int = 384,
        encoder: str | None = None,
        encoder_revision: str | None = None,
        pooling: str | None = None,
        mpp: float | None = None,
        tile_size: int | None = None,
        **kwargs,
    ):
        self.input_dim = input_dim
        self.encoder = encoder
        self.encoder_revision = encoder_revision
        self.pooling = pooling
        self.mpp = mpp
        self.tile_size = tile_size
        super().__init__(**kwargs)
