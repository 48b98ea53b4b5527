"""zq serve builds a command; what it starts is another's, for real where that is installed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import zq
from tests.command import run
from tests.engines import engine_python
from tests.letters import CHARACTERS, SPECIAL, save_tokenizer
from tests.tiny import random_model, save_tiny
from zq.cli import serve
from zq.models.find import load_tokenizer


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
    more = shlex.split(run("serve", w4a8, "--print", "--", "--seed", "1").ok().out)
    assert more[-4:] == ["--linear-backend", "humming", "--seed", "1"]
    for words, said in (
        (["8000"], "'8000' is no option; give flags for the server behind --"),
        (
            ["--", "--tensor-parallel-size", "3"],
            "--tensor-parallel-size behind -- is set by --tp; leave it out",
        ),
        (["--", "--seed", "1", "--port=9"], "--port behind -- is set by --port; leave it out"),
        (["--", "--tensor-parallel", "2"], "--tensor-parallel behind -- is set by --tp"),
        (["--", "--tensor_parallel_size=3"], "--tensor-parallel-size behind -- is set by --tp"),
    ):
        done = run("serve", w4a8, "--print", *words)
        assert done.code == 2
        assert said in done.err
    done = run("serve", w4a8, "--engine", "transformers", "--print").ok()
    plain = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(w4a8)]
    assert shlex.split(done.out) == [*plain, "--host", "127.0.0.1", "--port", "8000"]
    assert "zq" not in done.out.replace(str(w4a8), "").replace(sys.executable, "")


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
    words = serve.server_command("vllm", Path("x"), "h", 1, 4, humming=True, with_zq=False)
    assert words[-4:] == ["--tensor-parallel-size", "4", "--linear-backend", "humming"]


@pytest.mark.usefixtures("everything")
def test_it_becomes_the_server(w4a8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append([path, *words]))
    said = run("serve", w4a8, "--engine", "transformers").ok().out
    assert shlex.join(started[0][1:]) == said.strip()
    assert started[0][0] == sys.executable


def test_nothing_is_installed(monkeypatch: pytest.MonkeyPatch, w4a8: Path, tmp_path: Path) -> None:
    """The checkpoint is looked at first; the command of a server that was named can be seen all the same."""
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    for words in ((), ("--print",)):
        done = run("serve", w4a8, *words)
        assert done.code == 2
        assert "no server is installed; pip install vllm or pip install 'transformers[serving]'" in done.err
        assert "there is no folder" in run("serve", tmp_path / "nowhere", *words).err
    assert "error: the server of vllm is not installed here; pip install vllm" in (
        run("serve", w4a8, "--engine", "vllm").err
    )
    for engine in ("vllm", "transformers"):
        done = run("serve", w4a8, "--engine", engine, "--print").ok()
        assert str(w4a8) in done.out
        assert f"the server of {engine} is not installed here" in done.err
    refused = run("serve", w4a8, "--engine", "vllm", "--print", "--tp", "3")
    assert "4 attention heads cannot be split between 3 devices" in refused.err


def test_the_command_for_elsewhere_counts_on_no_zq(
    w4a8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plug-in of this very environment is none of the one that vLLM is in."""
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("zq.plugins.vllm.entry_points", lambda group: [SimpleNamespace(name="zq")])
    done = run("serve", w4a8, "--engine", "vllm", "--print").ok()
    assert "checked for vllm:0.33:sm90\n" in done.err
    assert "--linear-backend humming" in done.out
    native = tmp_path / "native"  # the server of which has to have it
    run("export", w4a8, "--to", "zq", "-o", native).ok()
    done = run("serve", native, "--engine", "vllm", "--print").ok()
    assert "checked for vllm:0.33:sm90:zq\n" in done.err


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "openai", "accelerate"])
def test_half_a_server_is_none(missing: str, w4a8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own server refuses to start without these."""
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == missing else object())
    done = run("serve", w4a8, "--engine", "transformers")
    assert done.code == 2
    assert "the server of transformers is not installed here; pip install 'transformers[serving]'" in done.err


@pytest.mark.usefixtures("everything")
def test_the_version_is_the_installed_one(w4a8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_capability", lambda: 90)
    monkeypatch.setattr("zq.plugins.vllm.vllm_version", lambda: "0.32.0+cpu")
    done = run("serve", w4a8, "--print").ok()
    assert "vllm:0.32.0:sm90: judged by what zq knows of vllm 0.33, the nearest version" in done.err
    monkeypatch.setattr("zq.plugins.vllm.vllm_version", lambda: "0.33.1")
    assert "nearest version" not in run("serve", w4a8, "--print").ok().err


@pytest.mark.parametrize("host", ["", " ", "-x", "a b"])
def test_addresses_that_are_none(host: str, w4a8: Path) -> None:
    done = run("serve", w4a8, "--print", f"--host={host}")
    assert done.code == 2
    assert f"--host '{host}' is no address" in done.err


@pytest.mark.usefixtures("everything")
def test_what_cannot_be_served(w4a8: Path, tmp_path: Path) -> None:
    native = tmp_path / "native"
    run("export", w4a8, "--to", "zq", "-o", native).ok()
    done = run("serve", native, "--print")
    assert done.code == 2
    assert "cannot serve" in done.err
    assert "zq's own format; install zq beside it (vllm:zq), or use zq export --to compressed-" in done.err
    done = run("serve", native, "--print", "--engine", "transformers").ok()
    assert "import zq" in done.out
    assert "--engine tgi is unknown" in run("serve", w4a8, "--engine", "tgi").err
    done = run("serve", w4a8, "--print", "--engine", "transformers", "--tp", "2")
    assert done.code == 2
    assert "the server of transformers does not split a model" in done.err


def test_what_transformers_needs_for_a_format(w4a8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "compressed_tensors"
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == missing else object())
    done = run("serve", w4a8, "--engine", "transformers")
    assert done.code == 2
    assert "pip install compressed-tensors" in done.err
    assert (
        "pip install compressed-tensors" in run("serve", w4a8, "--print", "--engine", "transformers").ok().err
    )
    missing = "gptqmodel"
    assert "pip install" not in run("serve", w4a8, "--print", "--engine", "transformers").ok().err


@pytest.mark.usefixtures("everything")
def test_zero_points_that_the_server_of_transformers_cannot_load(w4a8: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text("rules: [{match: '*', weights: 'int4:g32:asym'}]\ncalibration: {source: none}\n")
    run("quantize", w4a8.parent, "--recipe", recipe, "-o", out).ok()
    done = run("serve", out, "--print", "--engine", "transformers")
    assert done.code == 2
    assert "cannot load the zero points of compressed-tensors; use zq export --to zq" in done.err
    run("export", out, "--to", "zq", "-o", tmp_path / "native").ok()
    assert run("serve", tmp_path / "native", "--print", "--engine", "transformers").code == 0


PROMPT, TOKENS = "What is the capital of France?", 6


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A Llama in W8A8 and how it continues PROMPT, each token far ahead of the next likely one."""
    home = tmp_path_factory.mktemp("sure")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"num_hidden_layers": 2, "vocab_size": len(SPECIAL) + len(CHARACTERS), "head_dim": 32}
    more |= {"tie_word_embeddings": False, "max_position_embeddings": 128, "eos_token_id": None}
    model = random_model(LlamaConfig(**sizes, **more, architectures=["LlamaForCausalLM"]))
    with torch.no_grad():
        model.get_submodule("lm_head").weight.mul_(16)
    model.bfloat16().save_pretrained(home / "model")
    save_tokenizer(home / "model")
    run("quantize", home / "model", "--w8a8", "--calib", "none", "-o", home / "out").ok()
    tokenizer, loaded = load_tokenizer(home / "out"), zq.load(home / "out", dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for _ in range(TOKENS):
        with torch.no_grad():
            first, second = loaded(ids).logits[0, -1].topk(2).values.tolist()
            best = loaded(ids).logits[0, -1].argmax()
        assert first - second > 2
        ids = torch.cat([ids, best.reshape(1, 1)], 1)
    return home / "out", tokenizer.decode(ids[0, -TOKENS:])


def python_of(engine: str) -> str:
    """A Python with this server, or a skip that says what is missing."""
    if engine == "transformers" and all(map(find_spec, serve.SERVERS[engine])):
        return sys.executable
    return engine_python("vllm")  # where both are


@contextmanager
def started(python: str, folder: Path, log: Path, *flags: str) -> Iterator[str]:
    """The address of what `zq serve` starts, in a process group of its own that is ended behind it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    clone = Path(zq.__file__).parent.parent
    environment = os.environ | {
        "PYTHONPATH": str(clone),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    words = [python, "-m", "zq", "serve", str(folder), "--port", port, *flags]
    with log.open("w") as out:
        server = subprocess.Popen(words, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            assert server.poll() is None, log.read_text()[-2000:]
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                break
            time.sleep(1)
        yield address
        server.send_signal(signal.SIGINT)
        server.wait(60)
        assert ended(server.pid), "a process of the server is left"
    finally:
        with suppress(ProcessLookupError):  # nothing is left of the group
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(20)


def ended(group: int) -> bool:
    """Whether every process of the group has ended, at most half a minute from now."""
    for _ in range(60):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.5)
    return False


def posted(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


@pytest.mark.parametrize(
    ("engine", "flags"),
    [("vllm", ("--", "--enforce-eager", "--max-num-seqs", "2")), ("transformers", ())],
)
def test_a_server_that_answers(
    engine: str, flags: tuple[str, ...], sure: tuple[Path, str], tmp_path: Path
) -> None:
    python, (folder, wanted), log = python_of(engine), sure, tmp_path / "log"
    with started(python, folder, log, "--engine", engine, *flags) as address:
        body = {"model": str(folder), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        found = posted(f"{address}/v1/completions", body)
    assert found["choices"][0]["text"] == wanted
    assert found["usage"]["completion_tokens"] == TOKENS
    said = log.read_text()
    assert shlex.join([python, *(serve.VLLM if engine == "vllm" else serve.TRANSFORMERS)]) in said
