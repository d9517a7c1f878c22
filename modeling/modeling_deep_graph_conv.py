"""DeepGraphConv (Li et al. 2018, MICCAI): tiles hear from their neighbours in a graph before attention pools them."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .configuration_deep_graph_conv import DeepGraphConvConfig
from .gated_attention import GatedAttention
from .modeling_slide_head import SlideHead, SlideOutput


if TYPE_CHECKING:  # transformers 5.9 copies from a local folder only the files that this one names itself
    from .configuration_slide_head import SlideHeadConfig  # noqa: F401
    from .survival_loss import discrete_survival_loss  # noqa: F401


DISTANCES = 2**24  # held at once


class DeepGraphConvForSlideClassification(SlideHead):
    """Classifies a slide by gated attention over tiles after three graph isomorphism convolutions (Xu et al. 2019).

    With the layers and weights of HIPT's `DeepGraphConv`, and its edges, the logits are the same; that takes one slide at a
    time, and needs its edges made before.
    """

    config_class = DeepGraphConvConfig
    base_model_prefix = "deep_graph_conv"

    def __init__(self, config: DeepGraphConvConfig):
        super().__init__(config)
        width = config.hidden_dim
        self.convolutions = nn.ModuleList(GraphIsomorphism(dim, width) for dim in (config.input_dim, width, width))
        self.dropout = nn.Dropout(config.dropout)
        self.attention = GatedAttention(width, dropout=config.dropout)
        self.rho = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(config.dropout))
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        coords: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        edges: torch.Tensor | None = None,
    ) -> SlideOutput:
        """Logits and tile scores of a batch of bags.

        Args:
            features: (B, N, D). What stands in padded rows does not matter, be it NaN.
            mask: bool (B, N), True = real tile; None when every tile is.
            coords: (B, N, 2), the tiles' corners, which "spatial" edges need.
            labels: see `slide_loss`.
            edges: int (2, E), from which tile to which, in the batch of all B * N; the nearest of each when None.

        Raises ValueError for a bag without a real tile, and without coordinates where these make the edges.
        """
        features, mask = self.standardised(features, mask)
        if edges is None:
            edges = nearest_edges(self._places(features, coords), mask, self.config.num_neighbours)
        hidden = features.flatten(0, 1)  # (B * N, D)
        for convolution in self.convolutions:
            hidden = self.dropout(convolution(hidden, edges).relu())
        hidden = hidden.unflatten(0, mask.shape)  # (B, N, H)
        tile_scores = self.attention(hidden, mask)  # (B, N)
        slide_embedding = self.rho(torch.einsum("bn,bnh->bh", tile_scores, hidden))
        logits = self.classifier(slide_embedding)  # (B, C)
        return SlideOutput(
            loss=self.loss_of(logits, labels),
            logits=logits,
            slide_embedding=slide_embedding,
            tile_scores=tile_scores,
        )

    def _places(self, features: torch.Tensor, coords: torch.Tensor | None) -> torch.Tensor:
        """In what tiles are near each other (B, N, d)."""
        if self.config.edges == "latent":
            return features
        if coords is None:
            raise ValueError("the head's edges are spatial: pass coords")
        return coords.to(features.dtype)


class GraphIsomorphism(nn.Module):
    """Two layers over the sum of a tile and those it hears from (Xu et al. 2019, arXiv 1810.00826, eq. 4.1, epsilon 0)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.perceptron = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim))

    def forward(self, tiles: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """The next (n, H) of `tiles` (n, D) with `edges` (2, E)."""
        source, target = edges
        return self.perceptron(tiles.index_add(0, target, tiles[source]))


@torch.no_grad()
def nearest_edges(places: torch.Tensor, mask: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Edges int64 (2, E) to each real tile from its nearest, by Euclidean distance, in the batch of all B * N.

    Args:
        places: (B, N, d).
        mask: bool (B, N), True = real tile.
        neighbours: how many; fewer in bags that have no more.
    """
    length = places.shape[1]
    edges = []
    for bag, (place, real) in enumerate(zip(places, mask)):
        own = real.nonzero().squeeze(1)  # (n,)
        here, most = place[own], min(neighbours, len(own) - 1)
        for rows in torch.arange(len(own), device=own.device).split(max(1, DISTANCES // len(own))):
            distances = torch.cdist(here[rows], here)  # (r, n)
            distances[torch.arange(len(rows), device=own.device), rows] = float("inf")  # no tile is its own neighbour
            near = distances.topk(most, largest=False).indices  # (r, most)
            pair = torch.stack([own[near], own[rows].unsqueeze(1).expand_as(near)])
            edges.append(bag * length + pair.flatten(1))
    return torch.cat(edges, dim=1)
