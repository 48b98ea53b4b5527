"""An embedding layer that stays stable with quantized optimizer states (arXiv:2110.02861, section 2.3).

Xavier-uniform weights instead of normal ones, layer normalisation of the output, before position embeddings
are added, and optimizer states of 32 bits for this layer: a batch touches few of its rows, and those with
large gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StableEmbedding(nn.Embedding):
    """As nn.Embedding: x int64 [...] -> [..., embedding_dim]. zq.optim keeps its states in 32 bits."""

    def __init__(self, num_embeddings: int, embedding_dim: int, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device, dtype=self.weight.dtype)
        self.weight.optim_bits = 32  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        """Xavier-uniform; zeros for the padding."""
        nn.init.xavier_uniform_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return self.norm(super().forward(input))
