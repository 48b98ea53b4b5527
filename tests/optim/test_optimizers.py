"""AdamW and SGD: torch's to the bit with 32 bits, the plain algorithm with fewer; saving, overriding."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zq.errors import ZqError
from zq.numerics.codebook import codebook
from zq.numerics.qtensor import quantize
from zq.optim import SGD, AdamW, StableEmbedding, storage
from zq.optim.config import DEFAULTS
from zq.optim.storage import Full, Quantized, parts
from zq.spec import TensorSpec

SHAPES = [(130, 70), (90, 64), (17,), (6000,), (9, 10, 60)]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def give(step: int, *many: list[nn.Parameter]) -> None:
    """The same gradients to every list."""
    generator = torch.Generator().manual_seed(100 + step)
    for together in zip(*many, strict=True):
        grad = torch.randn(together[0].shape, generator=generator) * 0.1
        grad[: len(grad) // 3] = 0  # blocks that are never touched
        for p in together:
            p.grad = grad.to(p.dtype)


def equal(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("part", [64, 1 << 20])
def test_32_bits_are_torchs_adamw_to_the_bit(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PART", part)
    ours = parameters()
    theirs = twins(ours)

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[:2], "lr": 0.02, "weight_decay": 0.3},
            {"params": params[2:], "betas": (0.8, 0.95)},
        ]

    a, b = AdamW(groups(ours), eps=1e-6), torch.optim.AdamW(groups(theirs), eps=1e-6, foreach=False)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (a, b)]
    for step in range(8):
        give(step, ours, theirs)
        for optimizer, schedule in zip((a, b), schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert equal(ours, theirs)
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"] < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.8, "dampening": 0.3},
        {"weight_decay": 0.1},
    ],
)
def test_32_bits_are_torchs_sgd(options: dict[str, Any]) -> None:
    ours = parameters()
    theirs = twins(ours)
    a, b = SGD(ours, lr=0.1, **options), torch.optim.SGD(theirs, lr=0.1, foreach=False, **options)
    for step in range(6):
        give(step, ours, theirs)
        a.step()
        b.step()
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-7) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_to_maximize_is_to_step_with_the_gradient_turned_round(kind: Any, bits: int) -> None:
    """In one group of two; with 32 bits it is torch's maximize, whose file goes on."""
    ours, plain, theirs = parameters(), parameters(), parameters()
    options = {"lr": 0.01, "weight_decay": 0.1} | ({} if kind is AdamW else {"momentum": 0.9})

    def groups(params: list[nn.Parameter], maximize: bool) -> list[dict[str, Any]]:
        return [{"params": params[:2], "maximize": maximize}, {"params": params[2:]}]

    up, down = (
        kind(groups(ours, True), bits=bits, **options),
        kind(groups(plain, False), bits=bits, **options),
    )
    other = getattr(torch.optim, kind.__name__)(groups(theirs, True), foreach=False, **options)
    for step in range(4):
        give(step, ours, plain, theirs)
        for p in plain[:2]:
            assert p.grad is not None
            p.grad = -p.grad
        before = ours[0].grad
        up.step()
        assert ours[0].grad is before
        down.step()
        other.step()
    assert equal(ours, plain)
    if bits == 32:
        assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-7) for p, q in zip(ours, theirs, strict=True))
    again = kind(groups(ours, False), bits=bits, **options)
    again.load_state_dict(other.state_dict())
    assert [group["maximize"] for group in again.param_groups] == [True, False]


def through(x: Tensor, spec: str) -> Tensor:
    """A state as it comes back from its codes; small tensors stay."""
    if x.numel() <= 4096:
        return x
    if x.dim() == 1:
        spec = spec.replace("rank1", "b128")
    if x.dim() == 3 and "rank1" in spec:
        book = codebook(spec.split(":")[0])
        a, b, c = x.amax((1, 2)), x.amax((0, 2)), x.amax((0, 1))
        step = torch.minimum(torch.minimum(a[:, None, None], b[:, None]), c).clamp_min(
            torch.finfo(x.dtype).tiny
        )
        return book.decode(book.encode(x / step)) * step
    matrix = x.reshape(x.shape[0], -1) if x.dim() > 1 else x[None]
    return quantize(matrix, TensorSpec.parse(spec), "absmax", torch.float32).dequantize().reshape(x.shape)


@pytest.mark.parametrize("part", [512, 1 << 20])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_steps_are_the_plain_algorithm(
    bits: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dequantize, update in float32, quantize again (arXiv:2110.02861; arXiv:2309.01507, algorithm 1)."""
    monkeypatch.setattr(storage, "PART", part)
    ours = parameters()[:4]
    plain = [p.detach().clone() for p in ours]
    first, second = ([torch.zeros_like(p) for p in plain] for _ in range(2))
    how, optimizer = DEFAULTS[bits], AdamW(ours, lr=0.01, bits=bits, weight_decay=0.1)
    for step in range(1, 6):
        give(step, ours)
        optimizer.step()
        for i, p in enumerate(plain):
            g = ours[i].grad
            assert g is not None
            m, v = 0.9 * first[i] + 0.1 * g, 0.999 * second[i] + 0.001 * g * g
            p.mul_(1 - 0.01 * 0.1)
            p.sub_(0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
            first[i], second[i] = through(m, how.exp_avg), through(v, how.exp_avg_sq)
        for p, q in zip(ours, plain, strict=True):
            assert float((p - q).abs().max()) < 2e-3, step  # a code on the other side of a tie is one of many
            assert float((p - q).abs().mean()) < 1e-5, step


@pytest.mark.parametrize("bits", [8, 4])
def test_parts_change_no_bit(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for part in (1024, 1 << 20):
        monkeypatch.setattr(storage, "PART", part)
        params = parameters()
        optimizer = AdamW(params, lr=0.01, bits=bits)
        for step in range(4):
            give(step, params)
            optimizer.step()
        found.append(params)
    assert equal(*found)


def trained(bits: int, steps: int = 3, **options: Any) -> tuple[list[nn.Parameter], AdamW]:
    params = parameters()
    optimizer = AdamW(params, lr=0.01, bits=bits, **options)
    for step in range(steps):
        give(step, params)
        optimizer.step()
    return params, optimizer


def reloaded(saved: dict[str, Any]) -> dict[str, Any]:
    """Through a file, with nothing in it but tensors, numbers and text."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_saved_run_continues_to_the_bit(bits: int, rounding: str) -> None:
    states = None if bits == 32 else {"rounding": rounding}
    ours, first = trained(bits, states=states)
    theirs = twins(ours)
    second = AdamW(theirs, lr=0.5, bits=bits, states=states)
    for _ in range(2):  # torch gives an optimizer that has loaded more options
        second.load_state_dict(reloaded(first.state_dict()))
    assert second.param_groups[0]["lr"] == 0.01
    for step in range(3, 6):
        give(step, ours, theirs)
        first.step()
        second.step()
    assert equal(ours, theirs)


def dense(optimizer: Any, param: nn.Parameter, name: str) -> Tensor:
    state = optimizer.state[param][name]
    return torch.cat([state.read(*p) for p in parts(param.numel(), state)]).view(param.shape)


@pytest.mark.parametrize("after", [32, 8, 4])
@pytest.mark.parametrize("before", [32, 8, 4])
def test_states_load_across_widths(before: int, after: int) -> None:
    ours, first = trained(before)
    theirs = twins(ours)
    second = AdamW(theirs, bits=after)
    second.load_state_dict(reloaded(first.state_dict()))
    assert second.param_groups[0]["bits"] == after
    for p, q in zip(ours, theirs, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            was, now = dense(first, p, name), dense(second, q, name)
            how = getattr(DEFAULTS[after], name)
            wanted = was if after in (32, before) else through(was, how)
            assert torch.equal(now, wanted), (p.shape, name)
        assert int(second.state[q]["step"]) == 3
    give(4, theirs)
    second.step()


def test_states_of_torch_load_and_32_bit_states_load_in_torch() -> None:
    params = parameters()
    other = torch.optim.AdamW(params, lr=0.01, foreach=False)
    for step in range(3):
        give(step, params)
        other.step()
    theirs, back = twins(params), twins(params)
    ours = AdamW(theirs)
    ours.load_state_dict(other.state_dict())
    again = torch.optim.AdamW(back, foreach=False)
    again.load_state_dict({**other.state_dict(), "state": reloaded(ours.state_dict())["state"]})
    give(3, params, theirs, back)
    for optimizer in (other, ours, again):
        optimizer.step()
    assert equal(params, theirs)
    assert equal(params, back)


def test_override_at_any_time() -> None:
    model = nn.ModuleDict({"a": nn.Linear(80, 80), "b": nn.Linear(80, 80)})
    optimizer = AdamW(model.parameters(), bits=4)
    optimizer.override(model["a"], "weight", 32)  # before there are states
    for step in range(2):
        give(step, list(model.parameters()))
        optimizer.step()
    a, b = model["a"].weight, model["b"].weight
    assert isinstance(optimizer.state[a]["exp_avg"], Full)
    assert optimizer.state[b]["exp_avg"].spec == "dynamic4:b128"
    before = dense(optimizer, b, "exp_avg_sq")
    optimizer.override(model["b"], "weight", 32)  # and after
    assert torch.equal(dense(optimizer, b, "exp_avg_sq"), before)
    optimizer.override(model["b"], "weight", 8)
    assert optimizer.state[b]["exp_avg_sq"].spec == "udynamic8:b256"
    with pytest.raises(ZqError, match="'weight' of Linear is no parameter of this optimizer"):
        optimizer.override(nn.Linear(2, 2), "weight", 8)
    with pytest.raises(ZqError, match="bits=16 is not allowed; allowed: 32, 8, 4"):
        optimizer.override(model["b"], "weight", 16)
    copied = copy.deepcopy(optimizer)
    assert copied.state_bytes == optimizer.state_bytes


def test_small_tensors_and_stable_embeddings_stay_in_32_bits() -> None:
    embedding = StableEmbedding(100, 64, padding_idx=3)
    edge, above = nn.Parameter(torch.randn(4096)), nn.Parameter(torch.randn(4097))
    optimizer = AdamW([embedding.weight, edge, above], bits=8)
    give(0, [embedding.weight, edge, above])
    optimizer.step()
    kinds = [type(optimizer.state[p]["exp_avg"]) for p in (embedding.weight, edge, above)]
    assert kinds == [Full, Full, Quantized]
    bound = (6 / 164) ** 0.5
    assert float(StableEmbedding(100, 64).weight.abs().max()) <= bound
    out = embedding(torch.tensor([[1, 2], [5, 7]]))
    assert torch.allclose(out.mean(-1), torch.zeros(2, 2), atol=1e-5)
    assert torch.allclose(out.std(-1, unbiased=False), torch.ones(2, 2), atol=1e-2)
    fresh = StableEmbedding(10, 8, padding_idx=3)
    assert not fresh.weight[3].any()


@pytest.mark.parametrize(
    ("bits", "states", "wanted"),
    [
        (32, None, 64),
        (8, None, 2 * (8 + 32 / 256)),
        (4, {"exp_avg_sq": "ulinear4:b128"}, 2 * (4 + 32 / 128)),
        (4, None, 4 + 32 / 128 + 4 + 2 * 32 / 1024),
        (4, {"exp_avg_sq": "factored"}, 4 + 32 / 128 + 2 * 32 / 1024),
    ],
)
def test_bits_per_parameter(bits: int, states: dict | None, wanted: float) -> None:
    param = nn.Parameter(torch.zeros(1024, 1024))
    optimizer = AdamW([param], bits=bits, states=states)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.state_bytes * 8 / param.numel() == wanted
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert optimizer.state_bytes <= file.tell() <= optimizer.state_bytes + 4096


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_gradients_move_nothing_but_decay(bits: int) -> None:
    param = nn.Parameter(torch.ones(100, 100))
    optimizer = AdamW([param], lr=0.1, bits=bits, weight_decay=0.0)
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param, torch.ones(100, 100))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_an_element_without_a_gradient_is_left_alone_and_spoils_no_block(bits: int, bad: float) -> None:
    params, optimizer = trained(bits)
    give(5, params)
    before = params[0].detach().clone()
    assert params[0].grad is not None
    params[0].grad[90, 3] = bad
    optimizer.step()
    assert bool(torch.isfinite(params[0]).all())
    assert params[0][90, 3] == before[90, 3]
    assert params[0][90, 4] != before[90, 4]
    assert float(dense(optimizer, params[0], "exp_avg")[90, 3]) == 0
    assert float(dense(optimizer, params[0], "exp_avg_sq")[91].max()) > 0


def test_stochastic_rounding_keeps_small_changes_in_the_mean() -> None:
    """With nearest rounding a moment that moves by less than half a step stands still."""
    found = {}
    for rounding in ("nearest", "stochastic"):
        param = nn.Parameter(torch.zeros(100, 100))
        states = {"momentum_buffer": "dynamic4:b100", "rounding": rounding}
        optimizer = SGD([param], lr=0.0, momentum=0.99, dampening=0.99, bits=4, states=states)
        for i in range(60):
            param.grad = torch.full_like(param, 0.5 if i else 0.0)
            param.grad[:, 0] = 1.0
            optimizer.step()
        found[rounding] = float(dense(optimizer, param, "momentum_buffer")[:, 1:].mean())
    exact = 0.5 * (1 - 0.99**59)
    assert abs(found["stochastic"] - exact) < 0.05 * exact
    assert abs(found["nearest"] - exact) > 0.2 * exact


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_low_precision_parameters_have_states_of_full_precision(bits: int) -> None:
    params = parameters(dtype=torch.bfloat16)
    optimizer = AdamW(params, lr=0.1, bits=bits)
    for step in range(3):
        give(step, params)
        optimizer.step()
    assert all(p.dtype == torch.bfloat16 and bool(torch.isfinite(p).all()) for p in params)
    assert optimizer.state[params[2]]["exp_avg"].values.dtype == torch.float32


def test_a_parameter_that_is_not_contiguous() -> None:
    base = torch.randn(70, 80, generator=torch.Generator().manual_seed(0))
    a, b = nn.Parameter(base.clone().T), nn.Parameter(base.T.contiguous())
    assert not a.is_contiguous()
    for optimizer in (AdamW([a], lr=0.1, bits=8), AdamW([b], lr=0.1, bits=8)):
        a.grad = b.grad = torch.ones(80, 70) * torch.arange(70)
        optimizer.step()
    assert torch.equal(a, b)
    assert not torch.equal(a, base.T)


@pytest.mark.parametrize("bits", [8, 4])
def test_it_compiles_as_one_graph(bits: int) -> None:
    from zq.optim.kernel import adamw_step_

    ours, theirs = parameters()[:1], parameters()[:1]
    a, b = AdamW(ours, bits=bits), AdamW(theirs, bits=bits)
    for optimizer, params in ((a, ours), (b, theirs)):
        give(0, params)
        optimizer.step()
    compiled = torch.compile(adamw_step_, backend="eager", fullgraph=True)
    give(1, ours, theirs)
    for step, optimizer, param in ((adamw_step_, a, ours[0]), (compiled, b, theirs[0])):
        state = optimizer.state[param]
        with torch.no_grad():
            step(
                param,
                param.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                group=optimizer.param_groups[0],
                step=2,
            )
    assert torch.allclose(ours[0], theirs[0], rtol=1e-6, atol=1e-7)  # the last bit of a product may differ
    for name in ("exp_avg", "exp_avg_sq"):
        same = torch.isclose(dense(a, ours[0], name), dense(b, theirs[0], name), rtol=1e-6)
        assert float(same.float().mean()) > 0.999


def test_closures_and_missing_gradients() -> None:
    params = parameters()[:2]
    optimizer = AdamW(params, bits=8)
    params[0].grad = torch.ones_like(params[0])
    before = params[1].detach().clone()
    assert optimizer.step(lambda: 2.5) == 2.5
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 16}, "bits=16 is not allowed; allowed: 32, 8, 4"),
        ({"lr": -1.0}, "lr=-1.0 is not allowed"),
        ({"betas": (0.9, 1.0)}, "from 0 to below 1"),
        (
            {"bits": 8, "states": {"exp_avg_q": "dynamic8:b256"}},
            "key 'exp_avg_q' is unknown; allowed: exp_avg,",
        ),
        ({"bits": 8, "states": {"momentum_buffer": "dynamic8:b256"}}, "'momentum_buffer' is unknown"),
        ({"bits": 8, "states": {"threshold": "many"}}, "'threshold' must be int"),
        ({"bits": 8, "states": {"scale": "mse"}}, "allowed: absmax, absmax-signed"),
        ({"bits": 8, "states": {"exp_avg": "dynamic8"}}, "write FORMAT:LAYOUT"),
        ({"bits": 8, "states": {"exp_avg": "dynamic8:g64"}}, "layout bN, tensor or rank1"),
        ({"bits": 8, "states": {"exp_avg": "kmeans8:b64"}}, "not estimated"),
        ({"bits": 8, "states": {"exp_avg": "udynamic8:b64"}}, "no negative values"),
        ({"bits": 8, "states": {"exp_avg": "factored"}}, "write FORMAT:LAYOUT"),
        ({"bits": 32, "states": {"exp_avg": "dynamic8:b64"}}, "with bits=32 states are float32"),
        ({"bits": 8, "states": {"keep_sign": True, "scale": "absmax-signed"}}, "drop one"),
        ({"bits": 8, "states": 3}, "is no mapping"),
        ({"bits": 8, "states": "nowhere.yaml"}, "cannot read nowhere.yaml"),
    ],
)
def test_what_cannot_be_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ZqError) as caught:
        AdamW(parameters(), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refusals_of_sgd_and_of_saved_states() -> None:
    with pytest.raises(ZqError, match="nesterov=True needs momentum"):
        SGD(parameters(), nesterov=True)
    _, optimizer = trained(8)
    other = AdamW([nn.Parameter(torch.zeros(70, 130)), *parameters()[1:]], bits=8)
    with pytest.raises(ZqError, match=r"'exp_avg' has shape \[130, 70\]"):
        other.load_state_dict(optimizer.state_dict())
    sparse = nn.Embedding(100, 64, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ZqError, match="a gradient is sparse"):
        AdamW(sparse.parameters(), bits=8).step()


def test_groups_and_files_say_how_states_are_stored(tmp_path: Any) -> None:
    file = tmp_path / "states.yaml"
    file.write_text("exp_avg: dynamic8:b64\nthreshold: 100\n")
    params = parameters()
    optimizer = AdamW(
        [{"params": params[:1], "bits": 8, "states": str(file)}, {"params": params[1:]}], bits=4
    )
    give(0, params)
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].spec == "dynamic8:b64"
    assert optimizer.state[params[0]]["exp_avg_sq"].spec == "udynamic8:b256"
    assert optimizer.state[params[1]]["exp_avg"].spec == "dynamic4:b128"
    file.write_text("exp_avg: dynamic8:b64\nnonsense: 1\n")
    with pytest.raises(ZqError, match=r"states.yaml: key 'nonsense' is unknown"):
        AdamW(params, bits=8, states=file)
