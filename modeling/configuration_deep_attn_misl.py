"""Configuration of DeepAttnMISL (Yao et al. 2020, arXiv 2009.11169): clusters of tiles, each with layers of its own."""

from .configuration_slide_head import SlideHeadConfig


class DeepAttnMislConfig(SlideHeadConfig):
    """What a head over clusters of tiles is made of; the defaults are those of HIPT's comparison.

    Args, beside those of `SlideHeadConfig`:
        num_clusters: K, the same clusters for all slides.
        hidden_dim: width H of a tile and of a cluster.
        attention_dim: width of both branches of the gate, and of what the classifier sees.
        dropout: probability of dropout everywhere.
    """

    model_type = "deep_attn_misl"

    def __init__(
        self,
        input_dim: int = 384,
        num_clusters: int = 10,
        hidden_dim: int = 512,
        attention_dim: int = 256,
        dropout: float = 0.25,
        **kwargs,
    ):
        self.num_clusters = num_clusters
        self.hidden_dim = hidden_dim
        self.attention_dim = attention_dim
        self.dropout = dropout
        super().__init__(input_dim=input_dim, **kwargs)
