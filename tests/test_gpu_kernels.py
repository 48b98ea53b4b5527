"""On a CUDA device: every operator against its reference on fresh random data.

Outputs lie in memory full of NaN before, so what a kernel forgets to write shows. Quantized activations and
products of integers are equal to the last bit; norms and activation functions may differ where a sum or a
function of the device is rounded otherwise; products of floats are compared with the rounding of their sums.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.inputs import BF16, FP8, FP16, activations, gemm_calls, quant_calls
from tests.kernels.near_quant import verdict
from zq.errors import ZqError
from zq.kernels import ops  # noqa: F401  (registers the operators)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EXACT = {"w8a8_int8", "w4a8_int8"}


def has_fp8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


def uses_fp8(name: str, args: tuple) -> bool:
    return "fp8" in name or FP8 in args


def moved(args: tuple) -> tuple:
    return tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in args)


def poison() -> None:
    """Fill the free memory that the next outputs come from with NaN (0xff)."""
    torch.cuda.synchronize()
    held = [torch.full((1 << size,), 0xFF, dtype=torch.uint8, device="cuda") for size in range(9, 25)]
    held += [torch.full((1 << size,), 0xFF, dtype=torch.uint8, device="cuda") for size in range(9, 21)]
    torch.cuda.synchronize()
    del held


def outputs(name: str, args: tuple) -> list[Tensor]:
    made = getattr(torch.ops.zq, name)(*args)
    return list(made) if isinstance(made, tuple) else [made]


def compare(name: str, args: tuple) -> None:
    wanted = outputs(name, args)
    on_gpu = moved(args)
    poison()
    found = [each.cpu() for each in outputs(name, on_gpu)]
    if "quant" in name:
        assert verdict(name, args, found, wanted) == "", name
        return
    for a, b in zip(found, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = a.double(), b.double()
        assert torch.equal(torch.isfinite(a), torch.isfinite(b)), name
        if name in EXACT:
            assert torch.equal(a, b), f"{name}: {(a != b).sum()} of {a.numel()} differ"
        else:
            finite = torch.isfinite(b)  # FP16 overflows, in both
            assert torch.equal(a[~finite & ~b.isnan()], b[~finite & ~b.isnan()]), name
            a, b = a.where(finite, 0.0), b.where(finite, 0.0)
            largest = b.abs().amax(-1, keepdim=True).clamp_min(1e-30)
            assert ((a - b).abs() / largest).max() <= 2 * torch.finfo(found[0].dtype).eps, name


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("k", [16, 48, 256, 1008, 1024, 1040, 4096, 5120, 14336, 28672, 32768, 32784, 40000])
@pytest.mark.parametrize("m", [1, 5, 300])
def test_activations(m: int, k: int, dtype: torch.dtype) -> None:
    if m * k > 1 << 21:
        m = 3
    for name, args in quant_calls(m, k, dtype):
        if has_fp8() or not uses_fp8(name, args):
            compare(name, args)


@pytest.mark.parametrize("k", [16, 512, 4096, 16384, 16400])
def test_float32_activations(k: int) -> None:
    x = activations(7, k, torch.float32)
    for name in ("quant_int8", "quant_fp8", "quant_fp8_block128"):
        if has_fp8() or "fp8" not in name:
            compare(name, (x,))


def test_extreme_rows() -> None:
    rows = [[0.0] * 16, [5.0] * 16, [1e-45] * 16, [3e38, 1e-3] * 8, [torch.inf, 1.0] * 8, [-torch.inf] * 16]
    rows += [[2.0**-e * (1 + i / 16) for i in range(16)] for e in range(-120, 149, 3)]
    x = torch.tensor(rows)
    for name in ("quant_int8", "quant_fp8"):
        if has_fp8() or "fp8" not in name:
            compare(name, (x,))
    poisoned = torch.ones(2, 64)
    poisoned[1, 33] = torch.nan
    _, scale, _ = outputs("quant_int8", (poisoned.cuda(),))
    assert torch.isnan(scale).tolist() == [False, True]


def test_every_bf16_number() -> None:
    """All finite bf16 values as the elements of rows whose largest value sets many different scales."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    finite = bits[torch.isfinite(bits)]
    x = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))]
    for k in (16, 32):
        for name in ("quant_int8", "quant_fp8"):
            if has_fp8() or "fp8" not in name:
                compare(name, (x[: len(x) // k * k].reshape(-1, k),))


@pytest.mark.parametrize(("m", "k"), [(9000, 512), (600, 8704)])
def test_a_token_does_not_depend_on_its_batch(m: int, k: int) -> None:
    """Few rows and many are launched in other ways."""
    for name, args in quant_calls(m, k):
        if uses_fp8(name, args) and not has_fp8():
            continue
        whole = outputs(name, moved(args))
        alone = [arg[7:8].contiguous() if isinstance(arg, Tensor) and arg.dim() == 2 else arg for arg in args]
        for a, b in zip(whole, outputs(name, moved(tuple(alone))), strict=True):
            assert a.shape[0] == 0 or torch.equal(a[7].float(), b[0].float()), name


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (40, 160), (256, 1024), (648, 2064)])
@pytest.mark.parametrize("m", [1, 3, 8, 9, 17, 64, 65, 129, 300])
def test_products(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    for name, args in gemm_calls(m, n, k, dtype):
        if has_fp8() or not uses_fp8(name, args):
            compare(name, args)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (16, 1024, 14336), (200, 6144, 4096), (1024, 512, 28672)]
)
def test_large_products_of_integers(m: int, n: int, k: int) -> None:
    for name, args in gemm_calls(m, n, k):
        if name in EXACT:
            compare(name, args)


def test_a_cuda_graph_and_another_stream() -> None:
    from zq.kernels import cuda

    for name, args in [*quant_calls(5, 512), *gemm_calls(5, 256, 512)]:
        if uses_fp8(name, args) and not has_fp8():
            continue
        here = moved(args)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            wanted = outputs(name, here)  # loads the kernel and its workspace
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                made = outputs(name, here)
            for each in made:
                each.view(torch.uint8).fill_(0xFF) if each.numel() else None
            graph.replay()
        stream.synchronize()
        for a, b in zip(made, wanted, strict=True):
            assert torch.equal(a.float(), b.float()), name
    assert cuda.describe(0).sms > 0


def test_a_graph_of_a_shape_that_has_not_run_on_its_stream(monkeypatch) -> None:
    """It brings its own workspace, zero at every replay."""
    from zq.kernels import cuda

    for name, args in gemm_calls(5, 256, 4096):
        if uses_fp8(name, args) and not has_fp8():
            continue
        here = moved(args)
        wanted = outputs(name, here)
        torch.cuda.synchronize()
        monkeypatch.setattr(cuda, "_workspaces", {})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = outputs(name, here)
        for _ in range(3):
            made[0].view(torch.uint8).fill_(0xFF)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(made[0].float(), wanted[0].float()), name


def test_a_kernel_is_not_loaded_during_a_capture(monkeypatch) -> None:
    from zq.kernels import cuda, launch

    x = torch.ones(2, 64, device="cuda")
    outputs("quant_int8", (x,))
    monkeypatch.setattr(cuda, "_functions", {})
    launch.forget()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ZqError, match="a CUDA graph is being captured"), torch.cuda.graph(graph):
        outputs("quant_int8", (x,))


def test_a_new_thread() -> None:
    """It has no context of its own until something makes torch's current."""
    import threading

    x = torch.ones(2, 64, device="cuda")
    found: list = []
    thread = threading.Thread(target=lambda: found.append(outputs("quant_int8", (x,))[1].cpu()))
    thread.start()
    thread.join()
    assert torch.equal(found[0], torch.full((2,), 1 / 127.5))


def test_tensors_on_two_devices_are_refused() -> None:
    x = torch.ones(2, 64, device="cuda", dtype=BF16)
    with pytest.raises(ZqError, match="weight is on cpu, the input on cuda:0"):
        outputs("rms_norm_quant", (x, torch.ones(64, dtype=BF16), 1e-5, torch.int8))
    with pytest.raises(ZqError, match="16 bytes"):
        outputs("quant_int8", (torch.ones(65, device="cuda")[1:].reshape(1, 64),))


def test_compiled_by_torch() -> None:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        q, scale, _ = torch.ops.zq.rms_norm_quant(x * 2, weight, 1e-5, torch.int8)
        return q.float() * scale[:, None]

    x, weight = activations(9, 256).cuda(), torch.ones(256, dtype=BF16, device="cuda")
    assert torch.allclose(torch.compile(block, fullgraph=True)(x, weight), block(x, weight), rtol=1e-2)
