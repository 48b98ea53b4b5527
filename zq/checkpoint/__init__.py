"""Checkpoints on disk: headers first, tensors lazily, output atomically, progress resumably."""
