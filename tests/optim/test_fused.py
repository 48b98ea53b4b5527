"""The kernel gives what torch's operations give, to the bit: parameters, codes and scales.

The kernel runs on the CPU here (tests/optim/emulated.py), and its pointwise operations round as torch's do
there; how those of a GPU differ is a test of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.emulated import Host
from zq.errors import ZqError
from zq.optim import SGD, AdamW, fused, layout
from zq.optim.storage import Factored, Full, Quantized

SHAPES = [(1,), (3,), (7, 3), (4100,), (33, 131), (3, 700), (260, 9), (5, 2, 30)]

ADAMW: dict[str, dict[str, Any]] = {
    "32": {"bits": 32},
    "8": {"bits": 8},
    "4": {"bits": 4},
    "8 B2048": {"bits": 8, "states": {"exp_avg": "dynamic8:b2048", "exp_avg_sq": "udynamic8:b2048"}},
    "8 tensor": {"bits": 8, "states": {"exp_avg": "dynamic8:tensor", "exp_avg_sq": "udynamic8:tensor"}},
    "8 rank1": {"bits": 8, "states": {"exp_avg": "int8:rank1", "exp_avg_sq": "udynamic8:rank1"}},
    "4 rank1": {"bits": 4, "states": {"exp_avg": "dynamic4:rank1", "exp_avg_sq": "ulinear4:rank1"}},
    "4 mixed": {"bits": 4, "states": {"exp_avg": "nf4:tensor", "exp_avg_sq": "udynamic4:rank1"}},
    "8 signed": {"bits": 8, "states": {"scale": "absmax-signed", "exp_avg": "int8:b512"}},
    "4 signed": {"bits": 4, "states": {"scale": "absmax-signed", "exp_avg": "dynamic4:tensor"}},
    "4 keep sign": {"bits": 4, "states": {"keep_sign": True, "exp_avg_sq": "udynamic4nz:b8"}},
    "4 and 8": {"bits": 4, "states": {"exp_avg_sq": "udynamic8:b64"}},
    "8 and 4": {"bits": 8, "states": {"exp_avg": "e4m3fn:b32", "exp_avg_sq": "ulinear4:tensor"}},
    "8 and 32": {"bits": 8, "states": {"exp_avg_sq": "float32"}},
    "32 and 8": {"bits": 8, "states": {"exp_avg": "float32"}},
    "4 and 32": {"bits": 4, "states": {"exp_avg": "e2m1fn:b16", "exp_avg_sq": "float32"}},
    "32 and 4": {"bits": 4, "states": {"exp_avg": "float32"}},
    "8 maximize": {"bits": 8, "maximize": True},
    "32 factored": {"bits": 8, "states": {"exp_avg": "float32", "exp_avg_sq": "factored"}},
    "8 factored": {"bits": 8, "states": {"exp_avg_sq": "factored"}},
    "4 factored": {"bits": 4, "states": {"exp_avg": "dynamic4:rank1", "exp_avg_sq": "factored"}},
}
SGDS: dict[str, dict[str, Any]] = {
    "32": {"bits": 32},
    "32 nesterov": {"bits": 32, "nesterov": True, "weight_decay": 0.1},
    "8": {"bits": 8, "weight_decay": 0.1},
    "8 nesterov": {"bits": 8, "nesterov": True, "states": {"momentum_buffer": "linear8:tensor"}},
    "4": {"bits": 4, "dampening": 0.3},
    "4 maximize": {"bits": 4, "maximize": True, "weight_decay": 0.1},
    "4 rank1": {"bits": 4, "weight_decay": 0.1, "states": {"momentum_buffer": "int4:rank1"}},
}


class Other(Tensor):
    """Not plain."""


def small(options: dict[str, Any]) -> dict[str, Any]:
    """The same with small tensors quantized too."""
    if options["bits"] == 32:
        return options
    return {**options, "states": {**options.get("states", {}), "threshold": 0}}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """With blocks of zeros, and of sizes far apart."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for shape in SHAPES:
        grad = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(
            -4, 2, shape, generator=generator
        )
        grad[: len(grad) // 3] = 0
        found.append(grad.to(dtype))
    return found


def pair(kind: type, params: list[nn.Parameter], **options: Any) -> tuple[Any, Any]:
    """(fused, plain) optimizers of copies of these parameters."""
    twins = [[nn.Parameter(p.detach().clone()) for p in params] for _ in range(2)]
    return kind(twins[0], **options), kind(twins[1], fused=False, **options)


def give(grads: list[Tensor], *optimizers: Any) -> None:
    """A step of each with these gradients."""
    for optimizer in optimizers:
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()


def assert_same(one: Any, two: Any) -> None:
    params = [o.param_groups[0]["params"] for o in (one, two)]
    for p, q in zip(*params, strict=True):
        assert torch.equal(p, q), f"{tuple(p.shape)}: {int((p != q).sum())} of {p.numel()} differ"
        for name in one.wanted(one.param_groups[0]):
            a, b = one.state[p][name], two.state[q][name]
            assert type(a) is type(b)
            for (key, x), y in zip(a.tensors().items(), b.tensors().values(), strict=True):
                assert torch.equal(x, y), f"{tuple(p.shape)} {name} {key}: {int((x != y).sum())} differ"


def supported(params: list[nn.Parameter], options: dict[str, Any]) -> list[nn.Parameter]:
    rank1 = any("rank1" in str(s) for s in options.get("states", {}).values()) or options["bits"] == 4
    return [p for p in params if p.dim() < 3 or not rank1]


@pytest.mark.parametrize("name", ADAMW)
def test_adamw_is_that_of_torchs_operations(name: str, host: Host) -> None:
    options = small(ADAMW[name])
    fast, plain = pair(AdamW, parameters(), lr=0.01, weight_decay=0.1, **options)
    for step in range(4):
        give(gradients(step), fast, plain)
        skipped = len(SHAPES) - len(supported(parameters(), options))
        assert sum(fast.unfused.values()) <= skipped, fast.unfused
        assert_same(fast, plain)
    shared = any(
        "tensor" in s or "rank1" in s for s in ADAMW[name].get("states", {}).values() if s is not True
    )
    assert {entry for _, entry, _ in host.launched} >= ({"step", "maxima", "scales"} if shared else {"step"})
    assert not any(bool(scratch.any()) for scratch in host.scratch.values())


@pytest.mark.parametrize("name", SGDS)
def test_sgd_is_that_of_torchs_operations(name: str, host: Host) -> None:
    options = small(SGDS[name])
    fast, plain = pair(SGD, parameters(), lr=0.1, momentum=0.9, **options)
    for step in range(4):
        give(gradients(step), fast, plain)
        assert sum(fast.unfused.values()) <= ("rank1" in name)
        assert_same(fast, plain)
    assert host.launched


@pytest.mark.parametrize("param", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_parameters_and_gradients_of_16_bits(
    bits: int, param: torch.dtype, grad: torch.dtype, host: Host
) -> None:
    chosen = [parameters(param)[i] for i in (3, 4)]
    fast, plain = pair(AdamW, chosen, lr=0.01, **small({"bits": bits}))
    for step in range(2):
        for optimizer in (fast, plain):
            for p, g in zip(optimizer.param_groups[0]["params"], gradients(step, grad)[3:5], strict=True):
                p.grad_dtype = grad
                p.grad = g.clone()
            optimizer.step()
    assert not fast.unfused
    assert_same(fast, plain)


@pytest.mark.parametrize(
    "name", ["32", "8", "4", "8 tensor", "4 rank1", "8 B2048", "32 factored", "4 factored"]
)
def test_gradients_that_are_no_numbers(name: str, host: Host) -> None:
    """With 32 bits they spoil the parameter as in torch; otherwise the element is left as it is."""
    options = small(ADAMW[name])
    fast, plain = pair(AdamW, [parameters()[i] for i in (3, 4)], lr=0.01, **options)
    for step in range(3):
        grads = gradients(step)[3:5]
        grads[0][2000], grads[0][4099], grads[1][0, 0] = torch.nan, -torch.inf, torch.inf
        grads[1][7] = torch.nan
        give(grads, fast, plain)
        for a, b in zip(fast.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert bool(a.isfinite().all()) == (name != "32")
        if name != "32":
            assert_same(fast, plain)


@pytest.mark.parametrize("name", ["8", "4", "8 tensor", "4 rank1"])
def test_numbers_at_the_ends_of_float32(name: str, host: Host) -> None:
    fast, plain = pair(AdamW, [parameters()[i] for i in (3, 4)], lr=0.01, **small(ADAMW[name]))
    for step, size in enumerate((1e-30, 3e38, 1e-44, 1e19)):
        give([g.sign() * size for g in gradients(step)[3:5]], fast, plain)
        assert_same(fast, plain)


def test_gradients_at_odd_addresses(host: Host) -> None:
    """Views of one large buffer, as some trainers keep them."""
    fast, plain = pair(AdamW, [parameters()[i] for i in (3, 4)], lr=0.01, bits=8)
    buffer = torch.cat([torch.zeros(1), *(g.reshape(-1) for g in gradients(0)[3:5])])
    for optimizer in (fast, plain):
        at = 1
        for p in optimizer.param_groups[0]["params"]:
            p.grad = buffer[at : at + p.numel()].view(p.shape)
            at += p.numel()
        optimizer.step()
    assert not fast.unfused
    assert_same(fast, plain)


@pytest.mark.parametrize("bits", [32, 8])
def test_many_parameters_are_few_launches(bits: int, host: Host) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(10 + i, generator=generator)) for i in range(97)]
    fast, plain = pair(AdamW, params, lr=0.01, **small({"bits": bits}))
    for optimizer in (fast, plain):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p) * torch.arange(len(p))
        optimizer.step()
    assert [entry for _, entry, _ in host.launched] == ["step"] * -(-97 // layout.ITEMS)
    assert_same(fast, plain)


def test_groups_and_steps_keep_their_own_numbers(host: Host) -> None:
    found = []
    for given in (None, False):
        a, b, c = (nn.Parameter(p.detach().clone()) for p in parameters()[3:6])
        groups = [{"params": [a, b], "lr": 0.1}, {"params": [c], "betas": (0.3, 0.5), "bits": 4}]
        optimizer = AdamW(groups, bits=8, states={"threshold": 0}, fused=given)
        for step in range(3):
            for p, grad in zip((a, b, c), gradients(step)[3:6], strict=True):
                p.grad = None if (p is b and step == 0) else grad
            optimizer.step()
        found.append((a, b, c))
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
    # a and b are a step apart; the rank-1 scales of c take three launches a step
    assert len(host.launched) == 1 + 2 + 2 + 3 * 3


@pytest.mark.parametrize("bits", [8, 4])
def test_a_saved_fused_run_goes_on_without_the_kernel(bits: int, host: Host) -> None:
    chosen = [parameters()[i] for i in (3, 4)]
    fast, plain = pair(AdamW, chosen, lr=0.01, bits=bits)
    for step in range(2):
        give(gradients(step)[3:5], fast)
    saved = copy.deepcopy(fast.state_dict())
    for p, q in zip(plain.param_groups[0]["params"], fast.param_groups[0]["params"], strict=True):
        p.data.copy_(q.data)
    plain.load_state_dict(saved)
    give(gradients(2)[3:5], fast, plain)
    assert_same(fast, plain)


def ulps(a: Tensor, b: Tensor) -> int:
    """Floats between two tensors of one sign."""
    return int((a.view(torch.int32) - b.view(torch.int32)).abs().max())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_roundings_of_a_gpu_are_an_ulp_away(
    kind: str, compiled_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step from zero states: a fused multiply-add and a product with 1 / root instead of a division. The
    change of a parameter is a quotient of two of them."""
    compiled_host.used(monkeypatch, "gpu")
    make = {"adamw": AdamW, "sgd": lambda *a, **b: SGD(*a, momentum=0.9, weight_decay=0.1, **b)}[kind]
    fast, plain = pair(make, [nn.Parameter(torch.full((4096,), 1.0))], lr=0.01)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        give([torch.rand(4096, generator=generator) + 0.5], fast, plain)
        for p, q in zip(fast.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
            assert ulps(p.detach(), q.detach()) <= 1
            for name in fast.names:
                assert ulps(fast.state[p][name].values, plain.state[q][name].values) <= 2
            q.data.copy_(p.data)
    if kind == "sgd":
        assert_same(fast, plain)


def test_an_adamw_step_is_rounded_as_torchs_cuda_kernels_round_it(
    compiled_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, where second moments that 8 bits made zero let a step be a hundred times the parameter."""
    compiled_host.used(monkeypatch, "gpu")
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(4096, generator=generator))
    optimizer = AdamW([param], lr=0.01, bits=32)

    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (a.double() * b.double() + c.double()).float()

    largest = 0.0
    for step in range(1, 6):
        p = param.detach().clone()
        g = torch.randn(4096, generator=generator) * torch.logspace(-6, 0, 4096)
        param.grad = g.clone()
        if step > 1:
            optimizer.state[param]["exp_avg_sq"].values[::2] = 0
        m, v = (
            optimizer.state[param][name].values.clone() if step > 1 else torch.zeros(4096)
            for name in optimizer.names
        )
        optimizer.step()
        rate, decay, keep, add, lerp, inverse, eps = torch.tensor(
            [
                -0.01 / (1 - 0.9**step),
                1 - 0.01 * 0.01,
                0.999,
                1 - 0.999,
                1 - 0.9,
                1 / (1 - 0.999**step) ** 0.5,
                1e-8,
            ]
        )
        m = fma(lerp, g - m, m)
        v = fma(add, g * g, v * keep)
        root = v.double().sqrt().float()
        change = (m.double() / (root * inverse + eps).double()).float()
        largest = max(largest, float((rate * change).abs().max()))
        assert torch.equal(param, fma(rate, change, p * decay)), step
        for name, wanted in zip(optimizer.names, (m, v), strict=True):
            assert torch.equal(optimizer.state[param][name].values, wanted), (step, name)
    assert largest > 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 8, "states": {"rounding": "stochastic"}}, "stochastic rounding"),
        (
            {"bits": 8, "states": {"exp_avg": "dynamic5:b64"}},
            "dynamic5:b64 has no kernel; formats of 4 and 8",
        ),
        ({"bits": 8, "states": {"exp_avg": "dynamic8:b64:s=bf16"}}, "float32 scales"),
        ({"bits": 8, "states": {"exp_avg": "dynamic8:b96"}}, "dynamic8:b96 has no kernel; blocks of 8, 16"),
        ({"bits": 8, "states": {"exp_avg": "dynamic8:b4096"}}, "dynamic8:b4096 has no kernel; blocks of"),
        ({"bits": 8, "states": {"exp_avg": "dynamic8:rank1"}}, "rank1 of more than two dimensions"),
    ],
)
def test_what_has_no_kernel_is_computed_without_and_says_why(
    options: dict[str, Any], words: str, host: Host
) -> None:
    shape = (3, 4, 500) if "rank1" in str(options) else (100, 60)
    start = [nn.Parameter(torch.ones(shape))]
    fast, plain = pair(AdamW, start, lr=0.01, **options)
    give([torch.ones(shape)], fast, plain)
    assert not host.launched
    ((reason, count),) = fast.unfused.items()
    assert words in reason
    assert count == 1
    assert_same(fast, plain)
    with pytest.raises(ZqError, match="fused=True is not possible: "):
        give([torch.ones(shape)], AdamW([nn.Parameter(start[0].detach())], fused=True, **options))


def test_a_cpu_has_no_kernel_and_other_memory_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.zeros(50, 40).T)
    optimizer = AdamW([param], bits=8, fused=True)
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    with pytest.raises(ZqError, match="the parameter is on cpu; the kernel runs on CUDA; give fused=None"):
        optimizer.step()
    assert torch.equal(param, before)
    optimizer.fused = None
    optimizer.step()
    assert not torch.equal(param, before)
    monkeypatch.setattr(fused, "place", lambda param: 0)
    state = (Full(param), Factored(param))
    whole = param.detach().contiguous()
    assert "not contiguous" in str(fused.entry("adamw", param, state))
    assert "float64; the kernel takes float32, bf" in str(fused.entry("adamw", whole.double(), state))
    assert "empty" in str(fused.entry("adamw", torch.zeros(0), state))
    assert "a gradient is torch.float64" in str(fused.refused(whole.double()))
    assert "a gradient is not contiguous" in str(fused.refused(param))
    assert fused.refused(whole) is None
    other = whole.as_subclass(Other)
    assert fused.entry("adamw", other, state) == "the parameter is a Other; the kernel takes plain tensors"
    assert fused.refused(other) == "a gradient is a Other; the kernel takes plain tensors"


def test_a_machine_without_kernels_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def describe(index: int) -> None:
        asked.append(index)
        raise ZqError("there are no kernels for compute capability 7.5")

    fused._missing.cache_clear()
    monkeypatch.setattr(fused, "place", lambda param: 0)
    monkeypatch.setattr(fused.cuda, "describe", describe)
    param = nn.Parameter(torch.ones(30))
    optimizer = AdamW([param])
    for _ in range(3):
        param.grad = torch.ones(30)
        optimizer.step()
    assert optimizer.unfused == {"there are no kernels for compute capability 7.5": 1}
    assert asked == [0]
    fused._missing.cache_clear()


def test_a_step_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.ones(30))
    optimizer = AdamW([param])
    param.grad = torch.ones(30)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ZqError, match="cannot be captured into a CUDA graph"):
        optimizer.step()
    assert torch.equal(param, torch.ones(30))
    assert param not in optimizer.state


def test_states_are_written_where_they_were(host: Host) -> None:
    """Their addresses stay, so nothing keeps two copies of a state."""
    fast, _ = pair(AdamW, [parameters()[4]], lr=0.01, bits=4)
    give([gradients(0)[4]], fast)
    (param,) = fast.param_groups[0]["params"]
    state = fast.state[param]["exp_avg_sq"]
    assert isinstance(state, Quantized)
    before = [t.data_ptr() for t in state.tensors().values()]
    give([gradients(1)[4]], fast)
    assert [t.data_ptr() for t in state.tensors().values()] == before
