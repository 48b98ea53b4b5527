"""A tiny Llama with a tokenizer as a subject of a sweep, and a row as a finished cell leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.letters import save_tokenizer
from tests.tiny import save_tiny
from zq.data import load_text
from zq.sweep.subjects import Subject, environment, subject

SETTING: dict[str, Any] = {
    "text": "bundled-eval sha256:0",
    "windows": 5,
    "length": 24,
    "start": 0.0,
    "batch": 1,
    "tasks": [],
    "limit": None,
    "method": "rtn scale=absmax",
    **environment(["cpu"]),
}


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    """Two models of one family, tied and not."""
    found = []
    for name in ("llama", "llama-tied"):
        folder: Path = tmp_path_factory.mktemp("swept") / name
        save_tiny(name, folder)
        save_tokenizer(folder)
        found.append(subject(name, folder, load_text("bundled-eval"), 5, 24, 0.0))
    return found


def row(
    model: str = "m",
    bits: int = 4,
    size: int = 100,
    kl: tuple[float, ...] = (0.1, 0.2),
    nll: tuple[float, ...] = (2.0, 3.0),
    **changes: Any,
) -> dict[str, Any]:
    """What a cell of a model would have left, for tests of what is made of it."""
    type_ = changes.pop("type", "int")
    block = changes.pop("block", "64")
    seed = changes.pop("seed", 0)
    original = changes.pop("original", False)
    spec = None if original else f"{type_}{bits}:b{block}"
    return {
        "key": f"{model} {spec} {seed} {changes.get('identity', model)}",
        "cell": {
            "model": model,
            "bits": bits,
            "type": "original" if original else type_,
            "block": block,
            "seed": seed,
            "spec": spec,
        },
        "model": {
            "name": model,
            "identity": changes.pop("identity", model),
            "parameters": {"all": changes.pop("parameters", 50), "blocks": 40},
        },
        "setting": changes.pop("setting", SETTING),
        "tokens": changes.pop("tokens", "t"),
        "bytes": {"all": size, "blocks": changes.pop("inside", size // 2)},
        "bits_per_weight": bits + 0.25,
        "top1_agreement": 0.9,
        "kl_windows": list(kl),
        "nll_windows": list(nll),
        **changes,
    }
