"""On a CUDA device the fused optimizer step is that of torch's operations there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.optim.test_fused import ADAMW, SGDS, SHAPES, gradients, small
from zq.errors import ZqError
from zq.optim import SGD, AdamW
from zq.optim.fused import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = [*((AdamW, name) for name in ADAMW), *((SGD, name) for name in SGDS)]
LARGE = [(300, 1000), (1024, 512), (50_001,)]


def pair(kind: Any, shapes: list[tuple[int, ...]], dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """(fused, plain) on CUDA, from the same parameters."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]
    return tuple(kind([nn.Parameter(x.clone()) for x in start], fused=f, **options) for f in (None, False))  # type: ignore[return-value]


def step(optimizer: Any, grads: list[torch.Tensor]) -> None:
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        param.grad = grad.to(param.device, param.dtype)
    optimizer.step()


def apart(fast: Any, plain: Any) -> tuple[float, float]:
    """(largest difference of parameters in units of the last place of 1 + |p|, share of codes and scales that
    differ)."""
    worst, codes, count = 0.0, 0, 0
    for p, q in zip(fast.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        unit = torch.finfo(p.dtype).eps * (1 + q.detach().abs())
        worst = max(worst, float(((p - q).abs() / unit).max()))
        for name in fast.wanted(fast.param_groups[0]):
            a, b = fast.state[p][name].tensors(), plain.state[q][name].tensors()
            for key, x in a.items():
                if key == "values":
                    torch.testing.assert_close(x, b[key], rtol=2.4e-7, atol=1e-30)
                else:
                    codes += int((x != b[key]).sum())
                    count += x.numel()
    return worst, codes / max(count, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_steps_are_those_of_torchs_operations(kind: Any, name: str, dtype: torch.dtype) -> None:
    """Each from the same states: what a step may differ by must not grow over the next."""
    options = small((ADAMW if kind is AdamW else SGDS)[name]) | {"lr": 0.01}
    options |= {} if kind is AdamW else {"momentum": 0.9}
    shapes = [shape for shape in SHAPES if len(shape) < 3] + LARGE
    fast, plain = pair(kind, shapes, dtype, **options)
    for number in range(4):
        extra = [torch.randn(s, generator=torch.Generator().manual_seed(number)) for s in LARGE]
        grads = [g for g in gradients(number) if g.dim() < 3] + extra
        step(fast, grads)
        step(plain, grads)
        assert not fast.unfused
        worst, share = apart(fast, plain)
        assert worst <= 1
        assert share <= 1e-4
        fast.load_state_dict(copy.deepcopy(plain.state_dict()))
        for p, q in zip(fast.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
            p.data.copy_(q.data)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_long_run_stays_near(bits: int) -> None:
    fast, plain = pair(AdamW, LARGE, torch.float32, lr=1e-3, bits=bits)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        grads = [torch.randn(shape, generator=generator) for shape in LARGE]
        step(fast, grads)
        step(plain, grads)
    for p, q in zip(fast.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        assert float((p - q).abs().mean()) < 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_that_are_no_numbers_leave_their_elements(bits: int) -> None:
    fast, plain = pair(AdamW, LARGE, torch.float32, lr=0.01, bits=bits)
    grads = [torch.ones(shape) for shape in LARGE]
    for grad, bad in zip(grads, (torch.nan, torch.inf, -torch.inf), strict=True):
        grad.view(-1)[1234] = bad
    before = [p.detach().clone() for p in fast.param_groups[0]["params"]]
    step(fast, grads)
    step(plain, grads)
    for p, was in zip(fast.param_groups[0]["params"], before, strict=True):
        assert bool(p.isfinite().all())
        assert p.view(-1)[1234] == was.view(-1)[1234]
    assert apart(fast, plain)[0] <= 1


def test_a_fused_run_goes_on_on_the_cpu() -> None:
    fast, _ = pair(AdamW, LARGE, torch.float32, lr=0.01, bits=4)
    step(fast, [torch.ones(shape) for shape in LARGE])
    params = [nn.Parameter(p.detach().cpu().clone()) for p in fast.param_groups[0]["params"]]
    there = AdamW(params, lr=0.01, bits=4)
    there.load_state_dict(copy.deepcopy(fast.state_dict()))
    grads = [torch.full(shape, 0.5) for shape in LARGE]
    step(there, grads)
    step(fast, grads)
    for p, q in zip(params, fast.param_groups[0]["params"], strict=True):
        assert float((p - q.cpu()).abs().max()) < 1e-5


def test_many_parameters_are_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = pair(AdamW, [(100, 100)] * 79, torch.bfloat16, bits=8)
    grads = [torch.ones(100, 100)] * 79
    step(fast, grads)
    entries, launch = [], cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *a, **b: (entries.append(a[2]), launch(*a, **b))[1])
    step(fast, grads)
    assert entries == ["step", "step"]


def test_a_step_cannot_be_captured() -> None:
    fast, _ = pair(AdamW, LARGE, torch.float32, bits=8)
    step(fast, [torch.ones(shape) for shape in LARGE])
    with pytest.raises(ZqError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fast.step()
