"""normalise -> map -> round -> pack: pure functions on tensors, the same for every format."""
