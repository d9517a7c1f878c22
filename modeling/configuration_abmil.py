"""Configuration of the gated-attention head (Ilse et al. 2018, arXiv 1802.04712) in the form of Phikon's benchmarks."""

from transformers import PretrainedConfig


class AbmilConfig(PretrainedConfig):
    """What a gated-attention head is made of; the defaults are those of HistoSSLscaling's `abmil.yaml`.

    The classes are transformers' own `id2label`, and `problem_type` decides the loss (see `slide_loss`).

    Args:
        input_dim: length D of a tile's feature vector.
        attention_dim: length H of an embedded tile, and of both branches of the gate.
        tile_hidden_dims: widths of sigmoid layers between D and H; none in the published heads.
        mlp_hidden_dims: widths of the hidden layers between the slide's embedding and its logits.
        mlp_activation: transformers' name of the activation after each of them.
        dropout: probability of dropout after each of them.
        attention_temperature: divides the tiles' scores before the softmax; above 1 spreads the attention.
        encoder, encoder_revision, pooling: what made the features that the head was trained on, see `SlideFeatures`.
        mpp: microns per pixel of the tiles that the head was trained on.
        tile_size: their edge in pixels.
    """

    model_type = "abmil"

    def __init__(
        self,
        input_dim: int = 768,
        attention_dim: int = 128,
        tile_hidden_dims: list[int] | None = None,
        mlp_hidden_dims: list[int] | None = None,
        mlp_activation: str = "relu",
        dropout: float = 0.0,
        attention_temperature: float = 1.0,
        encoder: str | None = None,
        encoder_revision: str | None = None,
        pooling: str | None = None,
        mpp: float | None = None,
        tile_size: int | None = None,
        **kwargs,
    ):
        self.input_dim = input_dim
        self.attention_dim = attention_dim
        self.tile_hidden_dims = tile_hidden_dims or []
        self.mlp_hidden_dims = [128, 64] if mlp_hidden_dims is None else mlp_hidden_dims
        self.mlp_activation = mlp_activation
        self.dropout = dropout
        self.attention_temperature = attention_temperature
        self.encoder = encoder
        self.encoder_revision = encoder_revision
        self.pooling = pooling
        self.mpp = mpp
        self.tile_size = tile_size
        super().__init__(**kwargs)
