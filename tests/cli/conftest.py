"""A tiny Llama and a tiny BERT with tokenizers, and a W4A8 output: made once, only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import run
from tests.letters import save_tokenizer
from tests.tiny import save_tiny

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}</s>{% endif %}"
)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny("llama", folder)
    save_tokenizer(folder, template=TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    save_tiny("bert", folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def w4a8(llama, tmp_path_factory) -> Path:
    """What `zq quantize --w4a8` makes of the Llama."""
    out = tmp_path_factory.mktemp("outputs") / "w4a8"
    run("quantize", llama, "--w4a8", "--calib", "random", "-o", out).ok()
    return out
