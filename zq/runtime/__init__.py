"""Quantized checkpoints as running models."""
