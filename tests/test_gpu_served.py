"""On a CUDA device: weights made ready for serving compute what they do on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.inputs import activations
from zq.numerics.qtensor import QTensor, quantize
from zq.runtime.cpu import IntegerLinear
from zq.runtime.served import DenseLinear, KernelLinear, serve
from zq.spec import Scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SCHEMES = (
    *("int4:g64 @ int8:token", "int4:channel @ int8:token", "int4:g128:two-level @ int8:token"),
    *("int8:channel @ int8:token", "int4:g64", "int4:g32:asym", "int8:channel"),
    "e4m3fn:128x128 @ e4m3fn:g128",
)


def weight(scheme: Scheme) -> QTensor:
    x = torch.randn(192, 512, generator=torch.Generator().manual_seed(5)) * 0.02
    return quantize(x.bfloat16(), scheme.weights, "mse")


def moved(q: QTensor) -> QTensor:
    fields = {name: value.cuda() if torch.is_tensor(value) else value for name, value in vars(q).items()}
    return QTensor(**fields)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_are_what_the_cpu_computes(text: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(text)
    q, x, bias = weight(scheme), activations(33, 512, dtype), torch.randn(192).to(dtype)
    here, there = serve(q, scheme.activations, dtype), serve(moved(q), scheme.activations, dtype)
    assert type(there) is KernelLinear
    wanted, found = here(x, bias), there(x.cuda(), bias.cuda()).cpu()
    if type(here) is IntegerLinear and "two-level" in text:
        assert torch.equal(found, wanted)
    scale = wanted.float().abs().amax(1, keepdim=True)
    assert float(((found.float() - wanted.float()) / scale).abs().max()) < 2e-2


@pytest.mark.parametrize("text", ["int4:g64 @ int8:token", "e4m3fn:128x128 @ e4m3fn:g128"])
def test_as_one_compiled_graph_inside_a_cuda_graph(text: str) -> None:
    """What vLLM does with it."""
    scheme = Scheme.parse(text)
    made = serve(moved(weight(scheme)), scheme.activations, torch.bfloat16)
    x = activations(8, 512).cuda()
    wanted = made(x, None)
    whole = torch.compile(made, fullgraph=True)
    assert torch.equal(whole(x, None), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(x, None)
    graph.replay()
    assert torch.equal(y, wanted)


def test_without_a_kernel() -> None:
    scheme = Scheme.parse("int3:g64:asym @ int8:token")
    q, x = weight(scheme), torch.randn(4, 512)
    there = serve(moved(q), scheme.activations, torch.float32)
    assert type(there) is DenseLinear
    torch.testing.assert_close(
        there(x.cuda(), None).cpu(), serve(q, scheme.activations, torch.float32)(x, None)
    )
