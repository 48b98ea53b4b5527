"""The environments of real engines, as `make engines` makes them; $ENGINES says where they lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ENGINES = Path(os.environ.get("ENGINES") or Path.home() / ".cache" / "zq" / "engines")


def engine_python(name: str) -> str:
    """The Python of an environment (vllm, llama, gptq), or a skip that says what is missing."""
    there = ENGINES / name / "bin" / "python"
    if not there.is_file():
        pytest.skip(f"{there} is not there: make engines")
    return str(there)
