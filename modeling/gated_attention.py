"""Gated attention over the instances of a bag (Ilse et al. 2018, arXiv 1802.04712, eq. 9)."""

import torch
from torch import nn


class GatedAttention(nn.Module):
    """How much each instance counts for its bag: w(tanh(V h) * sigmoid(U h)), a softmax over the instances.

    Args:
        dim: length H of an instance.
        temperature: divides the scores before the softmax; above 1 spreads the attention.
        dropout: probability of dropout after the tangent, and after the sigmoid.
        hidden_dim: width of V h and U h; H when None.
    """

    def __init__(self, dim: int, temperature: float = 1.0, dropout: float = 0.0, hidden_dim: int | None = None):
        super().__init__()
        hidden_dim = dim if hidden_dim is None else hidden_dim
        self.value = nn.Linear(dim, hidden_dim)
        self.gate = nn.Linear(dim, hidden_dim)
        self.score = nn.Linear(hidden_dim, 1)
        self.temperature = temperature
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Weights (..., N) of the instances `hidden` (..., N, H): they sum to 1 and are 0 where `mask` (..., N) is False."""
        value, gate = torch.tanh(self.value(hidden)), torch.sigmoid(self.gate(hidden))
        scores = self.score(self.dropout(value) * self.dropout(gate)).squeeze(-1)  # (..., N)
        return (scores / self.temperature).masked_fill(~mask, float("-inf")).softmax(dim=-1)
