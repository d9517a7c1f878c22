"""Configuration of the dual-stream head (Li et al. 2021, arXiv 2011.08939)."""

from .configuration_slide_head import SlideHeadConfig


class DsmilConfig(SlideHeadConfig):
    """What a dual-stream head is made of; the defaults are those of HIPT's comparison.

    Args, beside those of `SlideHeadConfig`:
        query_dim: length of the queries by which tiles are compared with the critical one.
        dropout: probability of dropout before the values are made.
    """

    model_type = "dsmil"

    def __init__(
        self,
        input_dim: int = 384,
        query_dim: int = 128,
        dropout: float = 0.0,
        **kwargs,
    ):
        self.query_dim = query_dim
        self.dropout = dropout
        super().__init__(input_dim=input_dim, **kwargs)
