"""Optimizers whose states take 32, 8 or 4 bits: AdamW, SGD, and an embedding layer that is stable with them.

optimizer = zq.optim.AdamW(model.parameters(), lr=1e-3, bits=8)
"""

from zq.optim.embedding import StableEmbedding
from zq.optim.optimizers import SGD, AdamW

__all__ = ["SGD", "AdamW", "StableEmbedding"]
