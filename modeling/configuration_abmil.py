"""Configuration of the gated-attention head (Ilse et al. 2018, arXiv 1802.04712) in the form of Phikon's benchmarks."""

from .configuration_slide_head import SlideHeadConfig


class AbmilConfig(SlideHeadConfig):
    """What a gated-attention head is made of; the defaults are those of HistoSSLscaling's `abmil.yaml`.

    Args, beside those of `SlideHeadConfig`:
        attention_dim: length H of an embedded tile, and of both branches of the gate.
        tile_hidden_dims: widths of sigmoid layers between D and H; none in the published heads.
        mlp_hidden_dims: widths of the hidden layers between the slide's embedding and its logits.
        mlp_activation: transformers' name of the activation after each of them.
        dropout: probability of dropout after each of them.
        attention_temperature: divides the tiles' scores before the softmax; above 1 spreads the attention.
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
        **kwargs,
    ):
        self.attention_dim = attention_dim
        self.tile_hidden_dims = tile_hidden_dims or []
        self.mlp_hidden_dims = [128, 64] if mlp_hidden_dims is None else mlp_hidden_dims
        self.mlp_activation = mlp_activation
        self.dropout = dropout
        self.attention_temperature = attention_temperature
        super().__init__(input_dim=input_dim, **kwargs)
