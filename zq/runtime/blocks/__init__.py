"""Blocks whose parts run in few operators."""
