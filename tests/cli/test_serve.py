"""zq serve builds a command; what it would start is another's."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.command import run
from tests.letters import save_tokenizer
from tests.tiny import save_tiny
from zq.cli import serve
from zq.errors import ZqError


@pytest.fixture(scope="module")
def w4a8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("model")
    save_tiny("llama", model, torch.bfloat16)
    save_tokenizer(model)
    out = model / "w4a8"
    run("quantize", model, "--w4a8", "--calib", "none", "-o", out).ok()
    return out


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("VLLM_PLUGINS", "another")


@pytest.mark.usefixtures("everything")
def test_the_commands(w4a8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_capability", lambda: 90)
    words = shlex.split(run("serve", w4a8, "--print", "--port", "9000").ok().out)
    assert words[:4] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert words[4:9] == [str(w4a8), "--host", "127.0.0.1", "--port", "9000"]
    assert words[9:] == ["--linear-backend", "humming"]  # else vLLM would leave the activations in 16 bits
    done = run("serve", w4a8, "--engine", "transformers", "--print").ok()
    assert shlex.split(done.out)[3:] == ["serve", str(w4a8), "--host", "127.0.0.1", "--port", "8000"]


@pytest.mark.usefixtures("everything")
def test_with_the_plugin_nothing_is_ignored(
    w4a8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_capability", lambda: 90)
    monkeypatch.setattr("zq.plugins.vllm.entry_points", lambda group: [SimpleNamespace(name="zq")])
    monkeypatch.delenv("VLLM_PLUGINS")
    done = run("serve", w4a8, "--print").ok()
    assert "humming" not in done.out + done.err
    native = tmp_path / "native"
    run("export", w4a8, "--to", "zq", "-o", native).ok()
    assert str(native) in run("serve", native, "--print").ok().out
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert "humming" in run("serve", w4a8, "--print").ok().out


def test_what_needs_humming_gets_it() -> None:
    words = serve.server_command("vllm", Path("x"), "h", 1, 4, humming=True)
    assert words[-4:] == ["--tensor-parallel-size", "4", "--linear-backend", "humming"]


@pytest.mark.usefixtures("everything")
def test_it_becomes_the_server(w4a8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append([path, *words]))
    said = run("serve", w4a8, "--engine", "transformers").ok().out
    assert shlex.join(started[0][1:]) == said.strip()
    assert started[0][0] == sys.executable


def test_nothing_is_installed(monkeypatch: pytest.MonkeyPatch, w4a8: Path) -> None:
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ZqError, match="no server is installed; pip install vllm"):
        serve.installed("auto")
    with pytest.raises(ZqError, match="vllm is not installed"):
        serve.installed("vllm")


@pytest.mark.usefixtures("everything")
def test_what_cannot_be_served(w4a8: Path, tmp_path: Path) -> None:
    native = tmp_path / "native"
    run("export", w4a8, "--to", "zq", "-o", native).ok()
    done = run("serve", native, "--print")
    assert done.code == 2
    assert "cannot serve" in done.err
    assert "zq's own format" in done.err
    assert run("serve", native, "--print", "--engine", "transformers").code == 0
    assert "--engine tgi is unknown" in run("serve", w4a8, "--engine", "tgi").err
    done = run("serve", w4a8, "--print", "--engine", "transformers", "--tp", "2")
    assert done.code == 2
    assert "the server of transformers does not split a model" in done.err


def test_what_transformers_needs_for_a_format(w4a8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "compressed_tensors"
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == missing else object())
    done = run("serve", w4a8, "--print", "--engine", "transformers")
    assert done.code == 2
    assert "pip install compressed-tensors" in done.err
    missing = "gptqmodel"
    assert run("serve", w4a8, "--print", "--engine", "transformers").code == 0
