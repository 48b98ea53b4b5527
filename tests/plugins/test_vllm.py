"""What the vLLM plug-in decides without vLLM; its classes are tested in test_vllm_layers.py."""

from __future__ import annotations

import builtins
import logging
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from zq.errors import ZqError
from zq.export import compressed_tensors, native
from zq.plugins import vllm
from zq.spec import Scheme


def config(*texts: str) -> dict[str, Any]:
    return compressed_tensors.config({f"a.0.{i}": Scheme.parse(t) for i, t in enumerate(texts)}, ["lm_head"])


@pytest.mark.parametrize(
    ("texts", "cpu", "gpu"),
    [
        (["int4:g64 @ int8:token"], True, True),
        (["int4:channel @ int8:token"], True, True),
        (["int4:g64:asym @ int8:token"], True, False),  # no kernel: vLLM's own is faster than dequantizing
        (["int3:g64 @ int8:token"], True, False),
        (["int4:g64"], False, False),
        (["int8:channel @ int8:token"], False, False),
        (["int4:g128 @ e4m3fn:token"], False, False),
        (["int8:channel @ int8:token", "int4:g64 @ int8:token"], True, True),
    ],
)
def test_what_is_taken_over(texts: list[str], cpu: bool, gpu: bool) -> None:
    narrow = [Scheme.parse(text) for text in texts if text.startswith(("int4", "int3"))]
    assert vllm.taken(config(*texts), 0) == (narrow if cpu else [])
    assert vllm.taken(config(*texts), 90) == (narrow if gpu else [])
    assert vllm.taken(config(*texts), 75) == []


@pytest.mark.parametrize(
    "change",
    [
        {"input_activations": {"strategy": "group"}},
        {"input_activations": {"dynamic": False}},
        {"input_activations": {"symmetric": False}},
        {"weights": {"actorder": "group"}},
        {"weights": {"type": "float"}},
        {"weights": {"strategy": "tensor"}},
        {"format": "int-quantized"},
    ],
)
def test_what_only_looks_like_it_is_left_to_vllm(change: dict[str, Any]) -> None:
    found = config("int4:g64 @ int8:token")
    assert vllm.taken(found, 0)
    group = found["config_groups"]["group_0"]
    for key, value in change.items():
        group[key] = group[key] | value if isinstance(value, dict) else value
    assert vllm.taken(found, 0) == []


@pytest.mark.parametrize("broken", [{}, {"quant_method": "compressed-tensors"}, {"quant_method": "gptq"}])
def test_other_configs_are_passed_over(broken: dict[str, Any]) -> None:
    assert vllm.taken(broken, 0) == []
    assert vllm.taken({**broken, "config_groups": {"group_0": None, "group_1": {}}}, 0) == []


def test_the_layers_of_zqs_own_format() -> None:
    w4, w8 = Scheme.parse("int4:g64"), Scheme.parse("int8:channel @ int8:token")
    names = {"m.0.q_proj": w4, "m.0.k_proj": w4, "m.0.v_proj": w4, "m.0.down_proj": w8, "c.fused": w8}
    schemes = vllm.layer_schemes(native.config(names, []))
    assert schemes == names
    assert vllm.find(schemes, "m.0.qkv_proj", {}) == w4
    assert vllm.find(schemes, "m.0.down_proj", {}) == w8
    assert vllm.find(schemes, "m.0.gate_up_proj", {}) is None
    assert vllm.find(schemes, "m.0.attn", {}) is None
    assert vllm.find(schemes, "m.0.abc", {"abc": ["q_proj", "k_proj"]}) == w4
    with pytest.raises(ZqError, match=r"m\.0\.q_proj: int4:g64, m\.0\.down_proj: int8:channel @ int8"):
        vllm.find(schemes, "m.0.abc", {"abc": ["q_proj", "down_proj"]})
    with pytest.raises(ZqError, match=r"m\.0\.q_proj: int4:g64, m\.0\.x: not quantized"):
        vllm.find(schemes, "m.0.abc", {"abc": ["q_proj", "x"]})


def test_a_config_of_a_newer_format() -> None:
    with pytest.raises(ZqError, match="upgrade zq"):
        vllm.layer_schemes({"quant_method": "zq", "format_version": 2, "schemes": {}})


def test_a_vllm_that_does_not_fit_is_a_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM runs on; a plug-in that raises would stop every model."""
    real = builtins.__import__

    def missing(name: str, *args: Any, **more: Any) -> Any:
        if name.split(".")[0] == "vllm":
            raise ImportError("no module vllm.x")
        return real(name, *args, **more)

    monkeypatch.delitem(sys.modules, "zq.plugins.vllm_layers", raising=False)
    monkeypatch.delattr("zq.plugins.vllm_layers", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with caplog.at_level(logging.WARNING, "vllm.plugins.zq"):
        logging.getLogger("vllm").propagate = True
        vllm.register()
    assert "does not fit vLLM" in caplog.text
    assert "no module vllm.x" in caplog.text


def test_the_entry_point_is_the_function() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["project"]["entry-points"]["vllm.general_plugins"]
    found = EntryPoint("zq", listed["zq"], "vllm.general_plugins").load()
    assert found is vllm.register
