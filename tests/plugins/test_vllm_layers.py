"""vLLM's own layers and loaders with zq's method in them: whole, and as each of two ranks.

Needs vLLM (0.32, a CPU build is enough), which zq's own environment has not: `make test-engines` runs this
file in the environment of vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zq.errors import ZqError
from zq.export import compressed_tensors, native
from zq.numerics.qtensor import QTensor, quantize
from zq.runtime.cpu import PackedLinear
from zq.runtime.linear import QuantLinear
from zq.runtime.served import DenseLinear, serve
from zq.spec import Scheme

pytest.importorskip("vllm", reason="needs vLLM")
layers = pytest.importorskip("zq.plugins.vllm_layers", reason="needs a vLLM that the plug-in fits")

from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402

from zq.plugins import vllm as plugin  # noqa: E402

pytestmark = pytest.mark.vllm
K, HEADS, KV, SIZE = 256, 4, 2, 64
STORES: dict[str, Any] = {"zq": native, "compressed-tensors": compressed_tensors}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """vLLM's groups of processes, of one."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29591", 0, "gloo")
        initialize_model_parallel(1)
        plugin.register()
        plugin.register()  # vLLM may call it more than once
        yield


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """as_rank(r, size): layers that are made from now on are those of rank r."""

    def become(rank: int, size: int) -> None:
        from vllm.model_executor import parameter

        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    return become


def config_of(scheme: Scheme, names: list[str], storage: str) -> Any:
    """vLLM's config object for these layers."""
    stored = json.loads(json.dumps(STORES[storage].config(dict.fromkeys(names, scheme), [])))
    method = "zq"
    if storage != "zq":
        method = get_quantization_config("zq-w4a8").override_quantization_method(stored, None)
    return get_quantization_config(method).from_config(stored)


def weight(scheme: Scheme, n: int, k: int, seed: int) -> QTensor:
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05
    return quantize(x.bfloat16(), scheme.weights, "absmax")


def load(layer: Any, q: QTensor, scheme: Scheme, storage: str, shard: Any = None) -> None:
    """As vLLM's model loader does: tensor by tensor, then what follows loading."""
    for name, tensor in STORES[storage].pack("x", q, scheme).items():
        param = getattr(layer, name.removeprefix("x."))
        param.weight_loader(param, tensor, *([] if shard is None else [shard]))


def finish(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def reference(qs: list[QTensor], scheme: Scheme, x: Tensor) -> Tensor:
    """zq's own layers, one beside the other."""
    return torch.cat([serve(q, scheme.activations, x.dtype)(x, None) for q in qs], -1)


SCHEMES = [
    ("int4:g64 @ int8:token", "compressed-tensors"),
    ("int4:channel @ int8:token", "compressed-tensors"),
    ("int4:g64:asym @ int8:token", "compressed-tensors"),
    ("int3:g32 @ int8:token", "compressed-tensors"),
    ("int4:g64:two-level @ int8:token", "compressed-tensors"),
    *[(text, "zq") for text in ("int4:g64 @ int8:token", "int4:g64:two-level @ int8:token", "int2:g32:asym")],
    *[(text, "zq") for text in ("int3:g64:asym @ int8:token", "int5:channel", "int6:g128")],
    *[(text, "zq") for text in ("int7:channel:asym", "e4m3fn:g32")],
    *[(text, "zq") for text in ("int8:channel @ int8:token", "int8:tensor @ int8:token", "int8:g64")],
    *[(text, "zq") for text in ("e4m3fn:channel @ e4m3fn:token", "e4m3fn:tensor", "nf4:g64")],
    ("int4:g32:center", "zq"),
]
each = pytest.mark.parametrize(("text", "storage"), SCHEMES)


@each
@pytest.mark.parametrize("size", [1, 2])
def test_fused_qkv_of_different_sizes(text: str, storage: str, size: int, as_rank: Any) -> None:
    scheme = Scheme.parse(text)
    names = [f"m.layers.0.attn.{name}_proj" for name in "qkv"]
    rows = (HEADS * SIZE, KV * SIZE, KV * SIZE)
    qs = [weight(scheme, n, K, seed) for seed, n in enumerate(rows)]
    x = torch.randn(5, K)
    whole = [serve(q, scheme.activations, x.dtype)(x, None) for q in qs]
    found: list[list[Tensor]] = []
    for rank in range(size):
        as_rank(rank, size)
        layer = linear.QKVParallelLinear(
            K, SIZE, HEADS, KV, bias=False, quant_config=config_of(scheme, names, storage),
            params_dtype=x.dtype, prefix="m.layers.0.attn.qkv_proj",
        )  # fmt: skip
        assert type(layer.quant_method) is layers.ZqLinearMethod
        for shard, q in zip("qkv", qs, strict=True):
            load(layer, q, scheme, storage, shard)
        found.append(list(finish(layer)(x)[0].split([n // size for n in rows], -1)))
    for wanted, *shards in zip(whole, *found, strict=True):
        torch.testing.assert_close(torch.cat(shards, -1), wanted, rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("size", [1, 2])
def test_gate_and_up(text: str, storage: str, size: int, as_rank: Any) -> None:
    scheme = Scheme.parse(text)
    names = ["m.layers.0.mlp.gate_proj", "m.layers.0.mlp.up_proj"]
    qs = [weight(scheme, 192, K, seed) for seed in range(2)]
    x = torch.randn(3, K)
    parts = []
    for rank in range(size):
        as_rank(rank, size)
        layer = linear.MergedColumnParallelLinear(
            K, [192, 192], bias=False, quant_config=config_of(scheme, names, storage), params_dtype=x.dtype,
            prefix="m.layers.0.mlp.gate_up_proj",
        )  # fmt: skip
        for shard, q in enumerate(qs):
            load(layer, q, scheme, storage, shard)
        parts.append(finish(layer)(x)[0].split(192 // size, -1))
    found = torch.cat([torch.cat(pair, -1) for pair in zip(*parts, strict=True)], -1)
    torch.testing.assert_close(found, reference(qs, scheme, x), rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("size", [1, 2])
def test_row_parallel(text: str, storage: str, size: int, as_rank: Any) -> None:
    """Each rank quantizes its own part of a token, with a scale of its own, as ranks do on GPUs: so the sum
    is compared with that of the parts of the weight, not with the undivided layer."""
    scheme = Scheme.parse(text)
    q, x = weight(scheme, 96, K, 0), torch.randn(4, K)
    linears = QuantLinear(K, 96, scheme, bias=False, dtype=x.dtype)
    linears.set_weight(q)
    dense, bias = linears.dense(torch.float32), torch.randn(96)
    total, wanted = torch.zeros(4, 96), bias.clone()
    for rank, part in enumerate(x.split(K // size, -1)):
        as_rank(rank, size)
        layer = linear.RowParallelLinear(
            K, 96, bias=True, input_is_parallel=True, reduce_results=size == 1, skip_bias_add=size > 1,
            quant_config=config_of(scheme, ["m.layers.0.down"], storage), params_dtype=x.dtype,
            prefix="m.layers.0.down",
        )  # fmt: skip
        load(layer, q, scheme, storage)
        layer.bias.data.copy_(bias)
        total = total + finish(layer)(part)[0]
        seen = part if scheme.activations is None else layers_input(part, scheme)
        wanted = wanted + seen @ dense[:, rank * K // size : (rank + 1) * K // size].T
    if size > 1:
        total = total + bias
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5)


def layers_input(x: Tensor, scheme: Scheme) -> Tensor:
    from zq.numerics.qtensor import fake_quantize_tokens

    assert scheme.activations is not None
    return fake_quantize_tokens(x, scheme.activations)


@pytest.mark.parametrize("storage", STORES)
def test_a_row_parallel_shard_that_cuts_a_group(storage: str, as_rank: Any) -> None:
    scheme = Scheme.parse("int4:g128 @ int8:token")
    as_rank(0, 4)
    with pytest.raises(ZqError, match="256 inputs in groups of 128 cannot be split into 4 shards of 64"):
        linear.RowParallelLinear(256, 96, quant_config=config_of(scheme, ["m.x"], storage), prefix="m.x")


def test_the_integers_are_what_runs_and_float16_scales_are_kept() -> None:
    scheme = Scheme.parse("int4:g64 @ int8:token")
    q = weight(scheme, 96, K, 0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer = linear.ReplicatedLinear(
            K, 96, bias=False, quant_config=config_of(scheme, ["m.x"], "zq"), prefix="m.x", params_dtype=dtype
        )
        load(layer, q, scheme, "zq")
        if dtype == torch.bfloat16:
            assert type(finish(layer).served) is PackedLinear
            assert torch.equal(layer.served.scale, q.scale)
        else:
            assert type(finish(layer).served) is DenseLinear
            assert torch.equal(layer.served.weight, q.dequantize(dtype))
        assert not list(layer.parameters())
        x = torch.randn(3, K).to(dtype)
        assert torch.equal(layer(x)[0], serve(q, scheme.activations, dtype)(x, None))


def test_other_layers_of_a_taken_checkpoint_stay_vllms() -> None:
    mixed = {"m.layers.0.q_proj": "int8:channel @ int8:token", "m.layers.0.up": "int4:g64 @ int8:token"}
    stored = compressed_tensors.config({k: Scheme.parse(v) for k, v in mixed.items()}, ["m.layers.0.out"])
    stored = json.loads(json.dumps(stored))
    cls = get_quantization_config("zq-w4a8")
    assert cls.override_quantization_method(stored, None) == "zq-w4a8"
    assert cls.override_quantization_method(stored, "compressed-tensors") is None
    config = cls.from_config(stored)

    def method(name: str) -> str:
        layer = linear.ReplicatedLinear(K, 96, bias=False, quant_config=config, prefix=name)
        return type(layer.quant_method).__name__

    assert method("m.layers.0.q_proj") == "CompressedTensorsLinearMethod"
    assert method("m.layers.0.up") == "ZqLinearMethod"
    assert method("m.layers.0.out") == "UnquantizedLinearMethod"


def test_names_follow_the_model_and_heads_are_refused() -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.utils import WeightsMapper

    scheme = Scheme.parse("int4:g64")
    config = config_of(scheme, ["model.layers.0.up", "lm_head"], "zq")
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    name = "language_model.model.layers.0.up"
    layer = linear.ReplicatedLinear(K, 96, bias=False, quant_config=config, prefix=name)
    assert type(layer.quant_method) is layers.ZqLinearMethod
    with pytest.raises(ZqError, match="'lm_head' is int4:g64, and zq's vLLM plug-in serves quantized linear"):
        ParallelLMHead(160, K, quant_config=config, prefix="lm_head")


def test_the_log_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    layers._said.clear()
    logging.getLogger("vllm").propagate = True
    stored = compressed_tensors.config({"m.0.x": Scheme.parse("int4:g64 @ int8:token")}, [])
    with caplog.at_level(logging.INFO, "vllm.plugins.zq"):
        for _ in range(3):
            layers.TakenConfig.override_quantization_method(stored, None)
    assert caplog.text.count("zq takes over the layers that are int4:g64 @ int8:token") == 1


def test_where_the_package_is(tmp_path: Path) -> None:
    assert plugin.vllm_version().startswith("0.")
    layers.use_bundle(str(tmp_path))  # nothing on a CPU, and no error
