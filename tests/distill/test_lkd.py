"""LKD: it starts at what it was given, its gradients are the stated ones, and held-out data decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel

import zq
from tests.tiny import save_tiny, token_ids
from zq.checkpoint.index import read_index
from zq.checkpoint.reader import reader
from zq.distill import lkd, rounding
from zq.distill.losses import divergence, token_weights, weighted_mse
from zq.distill.rounding import LearnedRounding
from zq.distill.subs import Subs
from zq.models.capture import capture_inputs, has_head, head, run_block
from zq.numerics.groups import ungroup
from zq.numerics.levels import levels
from zq.numerics.qtensor import QTensor, quantize
from zq.numerics.scales import Scale
from zq.pipeline import quantize as run
from zq.plan import make_plan
from zq.quantizers.method import Layer
from zq.recipe import Recipe
from zq.spec import Scheme, TensorSpec

SCALED = ["int4:g16", "int3:channel", "int4:g16:asym", "int4:g32:narrow", "int2:tensor", "int4:g16:center"]
SCALED += ["int4:5x16"]
OTHERS = ["e4m3fn:channel", "e2m1fn:g16", "nf4:b16", "dynamic3:g16", "linear4:b64", "kmeans3:channel"]
FIXED = ["int4:rank1", "nf3:b64:pow2=16", "quantile4:rank1"]
KEPT = ["int4:g16:keep=3", "int4:g16:asym:keep=3", "nf4:g16:keep=3"]
SPECS = [*SCALED, *OTHERS, *FIXED, *KEPT, "int4:g16:two-level"]
PLACES = torch.tensor([3, 17, 39])


def _layer(text: str, seed: int = 0, generator: torch.Generator | None = None) -> Layer:
    torch.manual_seed(seed)
    module = nn.Linear(40, 24, bias=False).requires_grad_(False)
    spec = TensorSpec.parse(text.removesuffix(":keep=3"))
    kept = len(PLACES) if text.endswith("keep=3") else 0
    places = PLACES if kept else None
    layer = Layer("probe", "mlp", module, False, Scheme(replace(spec, kept=kept)), places=places)
    how = "absmax" if generator else "mse"
    q = quantize(layer.weight, layer.scheme.weights, how, torch.bfloat16, generator, places)
    layer.replace(q)
    return layer


def _same(a: QTensor, b: QTensor) -> bool:
    fields = ("codes", "scale", "zero", "sub", "shift", "center", "book", "kept", "places")
    pairs = [(getattr(a, name), getattr(b, name)) for name in fields]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


def _rounded_anew(state: LearnedRounding) -> QTensor:
    """What the latent rounds to, also where nothing has been learned."""
    state.offset.fill_(1e-30)
    return state.harden()


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("start", ["nearest", "stochastic", "another latent", "other weights"])
def test_it_starts_at_the_given_quantization(text: str, start: str) -> None:
    layer = _layer(text, 0, torch.Generator().manual_seed(1) if start == "stochastic" else None)
    given = layer.quantized
    assert given is not None
    if start == "another latent":  # such as GPTQ's before another step quantized
        layer.latent = torch.randn(24, 40)
    elif start == "other weights":  # such as those that lkd-classic trained
        layer._original = layer.original + 0.05 * torch.randn(24, 40)
    state = LearnedRounding(layer)
    assert torch.equal(state.weight(), given.dequantize())
    assert state.harden() is given
    if "kmeans" not in text and "quantile" not in text:  # two of their code values may be equal
        assert _same(_rounded_anew(state), given)


def test_a_latent_is_moved_no_further_than_the_codes_at_hand_ask_for() -> None:
    layer = _layer("int4:g16", 0, torch.Generator().manual_seed(1))
    state = LearnedRounding(layer)
    latent = ungroup(state.latent, state.shape, state.spec)
    stayed = latent == layer.original
    assert 0.5 < float(stayed.float().mean()) < 0.95
    steps = ungroup(state.latent / state.unit, state.shape, state.spec)
    given = layer.quantized
    assert given is not None
    assert torch.allclose((steps - given.codes)[~stayed].abs(), torch.tensor(0.49), atol=1e-4)
    side = (layer.original - given.dequantize()) * (latent - given.dequantize())
    assert bool((side >= 0).all())


@pytest.mark.parametrize("cached", [1 << 16, 100])
@pytest.mark.parametrize("text", SPECS)
def test_an_update_goes_against_the_straight_through_gradient(text: str, cached: int, monkeypatch) -> None:
    monkeypatch.setattr(rounding, "CACHED", cached)
    layer = _layer(text, 1)
    state = LearnedRounding(layer)
    state.offset.uniform_(-0.4, 0.4)
    if text not in FIXED:
        state.stretch.uniform_(-0.05, 0.05)
    gradient = torch.randn(24, 40)
    before = [part.clone().requires_grad_() for part in (state.offset, state.stretch)]
    loss = (_reference(state, *before) * gradient).sum()
    slopes = torch.autograd.grad(loss, before)
    state.update(gradient, 0.01, 0.002)
    after = (state.offset, state.stretch)
    for was, now, slope, step in zip(before, after, slopes, (0.01, 0.002), strict=True):
        if now is state.stretch and text in FIXED:
            assert torch.equal(now, was)
            continue
        clear = slope.abs() > 1e-4
        assert float(clear.float().mean()) > 0.4
        assert torch.allclose(now[clear], (was - step * slope.sign())[clear], atol=1e-6)
        if now is state.offset:
            assert torch.equal(now[slope == 0], was[slope == 0])
    assert torch.allclose(layer.weight, _reference(state, *after), atol=1e-6)
    assert torch.equal(layer.weight, state.weight())


def _reference(state: LearnedRounding, offset: torch.Tensor, stretch: torch.Tensor) -> torch.Tensor:
    """The weight from elementary operations, rounding and clipping straight through inside the range."""
    grid, q = state.grid, state.given
    step = state.unit * (1 + stretch)
    if state.subs is not None:
        step = step + (state.subs.step(stretch, slice(None)) - step).detach()
    ideal = state.latent / step
    if grid.values is None:
        zero = 0 if grid.zero is None else grid.zero
        u = ideal + zero + offset
        value = torch.round(u).clamp(grid.low, grid.high) - zero
        soft = ideal + offset
    else:
        values = grid.values.expand(state.latent.shape[0], -1)
        flat = ideal.detach().flatten(1).contiguous()
        below = (torch.searchsorted(values, flat, right=True) - 1).clamp(0, grid.high - 1)
        gap = values.gather(1, below + 1) - values.gather(1, below)
        place = below + (flat - values.gather(1, below)) / gap.clamp_min(1e-30)
        u = place.view_as(ideal) + offset
        number = torch.round(u).clamp(grid.low, grid.high).long()
        value = values.gather(1, number.flatten(1)).view_as(ideal)
        soft = ideal + offset * gap.view_as(ideal)
    inside = (u >= grid.low - 0.5) & (u <= grid.high + 0.5)
    found = torch.where(inside, soft + (value - soft).detach(), value.detach()) * step
    dense = ungroup(found if state.center is None else found + state.center, state.shape, state.spec)
    if q.kept is None:
        return dense
    assert q.places is not None
    return dense.index_copy(1, q.places.long(), q.kept.float())


@pytest.mark.parametrize("text", [*SCALED, *OTHERS, *KEPT, "int4:g16:two-level"])
def test_scales_learn_within_what_can_be_stored(text: str) -> None:
    state = LearnedRounding(_layer(text, 2))
    for _ in range(40):
        state.update(torch.randn(24, 40), 0.02, 0.02)
    hard, given = state.harden(), state.given
    assert hard.scale.dtype == given.scale.dtype
    changed = hard.scale if hard.sub is None else hard.scale.float() * hard.sub
    before = given.scale if given.sub is None else given.scale.float() * given.sub
    assert not torch.equal(changed, before)
    assert bool((changed.sign() == before.sign()).all())
    assert not torch.equal(hard.codes, given.codes)
    for name in ("zero", "center", "book", "kept", "places"):
        assert getattr(hard, name) is getattr(given, name)
    soft = state.weight()
    assert float((soft - hard.dequantize()).norm() / soft.norm()) < 0.1


@pytest.mark.parametrize("text", ["int4:g16:two-level", "int3:g8:two-level", "int6:g16:two-level"])
def test_learned_two_level_scales_are_exact_products_that_are_found_again(text: str) -> None:
    state = LearnedRounding(_layer(text, 2))
    assert state.subs is not None
    assert torch.equal(state._step(slice(None)), state.unit)
    moved = 0
    for seed in range(20):
        state.stretch.copy_(torch.empty_like(state.stretch).uniform_(-0.9, 2.0))
        state.offset.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed))
        hard = state.harden()
        assert hard.sub is not None
        assert torch.equal(hard.dequantize(), state.weight())
        found = levels(hard.scale.float().mul(hard.sub).to(torch.bfloat16), hard.spec)
        assert found is not None
        assert torch.equal(found[0], hard.scale)
        assert torch.equal(found[1], hard.sub)
        moved += int((hard.scale.float() * hard.sub != state.unit.squeeze(-1)).sum())
    assert moved > 200


def test_a_group_takes_the_storable_integer_that_is_nearest() -> None:
    """1.8125 is 29/16, so its products with 9, 11, 13 and 15 have nine significant bits: one too many."""
    scale = Scale(torch.tensor([[1.8125]]), sub=torch.tensor([[10, -4]], dtype=torch.int32))
    subs = Subs.of(scale, TensorSpec.parse("int4:g16:two-level"), torch.bfloat16)

    def integers(t: float) -> list[float]:
        return subs.integers(torch.full((1, 2, 1), t), slice(None)).tolist()[0]

    assert integers(0.0) == [10, -4]
    assert integers(0.04) == [10, -4]
    assert integers(0.16) == [12, -5]
    assert integers(-0.14) == [8, -3]
    assert integers(0.9) == [16, -8]
    assert integers(3.0) == [16, -14]
    assert integers(-0.95) == [1, -1]


def test_a_channel_scale_is_halved_while_its_integers_have_room() -> None:
    spec = TensorSpec.parse("int4:g16:two-level")
    for first, second, times in ((10, -4, 1), (5, -4, 2), (1, 1, 16), (8, 2, 2), (2, -8, 1), (2, -7, 2)):
        scale = Scale(torch.tensor([[1.8125]]), sub=torch.tensor([[first, second]], dtype=torch.int32))
        subs = Subs.of(scale, spec, torch.bfloat16)
        assert float(subs.channel) == 1.8125 / times
        assert subs.start.tolist() == [[times * first, times * second]]


def test_token_weights() -> None:
    targets = torch.ones(2, 8, 4)
    targets[0, 0] = 100.0
    targets[1, 7] = 1e-4
    weights = token_weights(targets, "normalised")
    assert weights[0, 0] < 0.01 * weights[0, 1]
    assert weights[1, 7] <= 3.01 * weights.median()
    assert bool((token_weights(targets, "mse") == 1).all())
    outputs = targets + 1
    assert weighted_mse(outputs, targets, torch.ones(2, 8)) == pytest.approx(1.0)


RECIPE = """
rules: [{match: '*', weights: 'WEIGHTS', activations: 'int8:token'}]
steps: [STEPS]
calibration: {source: random, samples: 96, length: 32}
"""


def _run(folder: Path, out: Path, steps: str, weights: str = "int3:g32", format: str = "auto") -> dict:
    text = RECIPE.replace("STEPS", steps).replace("WEIGHTS", weights) + f"format: {format}\n"
    return run(make_plan(folder, Recipe.parse(text)), out).report


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "bert-model", "qwen2"])
def test_it_improves_on_its_start(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    start = _run(tmp_path / "model", tmp_path / "gptq", "{gptq: {}}")
    end = _run(tmp_path / "model", tmp_path / "lkd", "{gptq: {}}, {lkd: {iterations: 40, lookahead: 0}}")
    last = [list(report["output_error"].values())[-1] for report in (start, end)]
    assert last[1] < 0.9 * last[0]
    if family != "gpt2":
        theirs = AutoModel.from_pretrained(tmp_path / "lkd")
        ours = zq.load(str(tmp_path / "lkd"))
        if family != "opt":  # transformers' compressed-tensors takes one scale for OPT's 2-D inputs
            base = getattr(ours, ours.base_model_prefix, ours)
            with torch.no_grad():
                assert torch.equal(theirs(token_ids())[0], base(token_ids())[0])


def test_zero_learning_keeps_the_start(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    _run(tmp_path / "model", tmp_path / "a", "{gptq: {}}")
    steps = "{gptq: {}}, {lkd: {iterations: 4, rounding_rate: 0.0, scale_rate: 0.0}}"
    _run(tmp_path / "model", tmp_path / "b", steps)
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


@pytest.mark.parametrize(("iterations", "checks", "times"), [(10, 4, 4), (400, 4, 4), (3, 4, 3), (7, 1, 1)])
def test_the_state_is_checked_so_many_times(
    iterations: int, checks: int, times: int, tmp_path: Path, monkeypatch
) -> None:
    """Beside the start; the last time at the end."""
    save_tiny("llama", tmp_path / "model")
    measured: list[int] = []
    monkeypatch.setattr(lkd.Course, "loss", lambda self, batches: measured.append(done[-1]) or 1.0)
    done = [0]

    def descend(*args) -> Iterator[int]:
        for i in range(iterations):
            done.append(i + 1)
            yield i + 1

    monkeypatch.setattr(lkd, "_descend", descend)
    _run(tmp_path / "model", tmp_path / "a", f"rtn, {{lkd: {{iterations: {iterations}, checks: {checks}}}}}")
    first = measured[: len(measured) // 2]  # of two blocks
    assert first[0] == 0
    assert len(first[1:]) == times
    assert first[-1] == iterations


def test_twice_the_same_bytes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    for name in "ab":
        _run(tmp_path / "model", tmp_path / name, "{rtn: {}}, {lkd: {iterations: 8}}", "int4:g32:two-level")
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_norms_learn_when_they_have_a_rate(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    text = RECIPE.replace("STEPS", "{rtn: {}}, {lkd: {iterations: 20, norm_rate: 0.05}}")
    plan = make_plan(tmp_path / "model", Recipe.parse(text.replace("WEIGHTS", "int3:g32")))
    norms = {f"{plan.skeleton.block_prefix(i)}.{p}.weight" for i in (0, 1) for p in plan.skeleton.norms(i)}
    assert {name for name, why in plan.may_change.items() if why == "lkd"} >= norms
    report = run(plan, tmp_path / "out").report
    assert {name for names in report["changed"].values() for name in names} >= norms
    old, new = (read_index(tmp_path / x) for x in ("model", "out"))
    before, after = (reader(index)(sorted(norms)) for index in (old, new))
    assert any(not torch.equal(before[name], after[name]) for name in norms)
    for name in norms:
        assert torch.allclose(before[name], after[name], rtol=0.026)


@pytest.mark.parametrize("lookahead", [0, 1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "bloom", "bert-model"])
def test_the_losses_are_those_of_what_is_written(family: str, lookahead: int, tmp_path: Path) -> None:
    """Both by hand, on the held-out windows: each written block, and each block rounded to nearest, on what
    the written blocks before it give, and the float model run on from there."""
    save_tiny(family, tmp_path / "model")
    _run(tmp_path / "model", tmp_path / "rtn", "{rtn: {}}")
    report = _run(
        tmp_path / "model",
        tmp_path / "out",
        f"{{rtn: {{}}}}, {{lkd: {{iterations: 20, lookahead: {lookahead}}}}}",
    )
    told = list(report["held_out_loss"].values())
    assert all(loss["end"] < loss["start"] for loss in told)
    model = Held(tmp_path / "model", batch=8)
    written, nearest = (model.blocks_of(tmp_path / name) for name in ("out", "rtn"))
    hidden = model.hidden
    for i, loss in enumerate(told):
        for key, blocks in (("start", nearest), ("end", written)):
            output = model.run([blocks[i]], hidden, i)
            assert loss[key] == pytest.approx(model.distance(output, i, lookahead), rel=2e-2)
        hidden = model.run([written[i]], hidden, i)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_window_of_two_measures_both_quantized(family: str, tmp_path: Path) -> None:
    """The loss at the start by hand: the next block is rounded to nearest, too."""
    save_tiny(family, tmp_path / "model")
    options = "iterations: 1, rounding_rate: 0.0, scale_rate: 0.0, window: 2, lookahead: 0"
    report = _run(tmp_path / "model", tmp_path / "out", f"{{rtn: {{}}}}, {{lkd: {{{options}}}}}")
    told = list(report["held_out_loss"].values())
    model = Held(tmp_path / "model", batch=8)
    blocks = model.blocks_of(tmp_path / "out")
    output = model.run(blocks[:2], model.hidden, 0)
    with torch.no_grad():
        assert told[0]["start"] == pytest.approx(model.distance(output, 1, 0, ahead=1), rel=2e-2)


def test_what_learned_along_leaves_the_float_model_as_it_was(tmp_path: Path) -> None:
    """A second step of two blocks aims at the outputs of the float blocks, and with no learning nothing
    changes; with learning, the last block starts from rounding to nearest as ever."""
    save_tiny("llama", tmp_path / "model")
    frozen = "{lkd: {iterations: 2, rounding_rate: 0.0, scale_rate: 0.0, window: 2}}"
    _run(tmp_path / "model", tmp_path / "a", "{gptq: {}}")
    once = _run(tmp_path / "model", tmp_path / "b", f"{{gptq: {{}}}}, {frozen}")
    twice = _run(tmp_path / "model", tmp_path / "c", f"{{gptq: {{}}}}, {frozen}, {frozen}")
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b") == _bytes(tmp_path / "c")
    assert once["held_out_loss"] == twice["held_out_loss"]
    learning = "{lkd: {iterations: 20, window: 2}}"
    both = _run(tmp_path / "model", tmp_path / "d", f"{{rtn: {{}}}}, {learning}, {frozen}")
    alone = _run(tmp_path / "model", tmp_path / "e", f"{{rtn: {{}}}}, {learning}")
    assert _bytes(tmp_path / "d") == _bytes(tmp_path / "e")
    last = [list(report["output_error"].values())[-1] for report in (both, alone)]
    assert last[0] == last[1]


class Held:
    """The float model on the last batch of the calibration windows of RECIPE."""

    def __init__(self, folder: Path, batch: int) -> None:
        text = RECIPE.replace("STEPS", "rtn").replace("WEIGHTS", "int3:g32")
        plan = make_plan(folder, Recipe.parse(text))
        skeleton, read = plan.skeleton, plan.view.read
        skeleton.load_outside(read)
        skeleton.load_tail(read)
        assert plan.windows is not None
        self.captured = capture_inputs(skeleton, list(plan.windows.split(batch)))
        for i in range(skeleton.n_blocks):
            skeleton.load_block(i, read)
        self.skeleton, self.last = skeleton, len(self.captured.hidden) - 1
        self.blocks = [skeleton.block(i) for i in range(skeleton.n_blocks)]

    @property
    def hidden(self) -> torch.Tensor:
        return self.captured.hidden[self.last]

    def blocks_of(self, out: Path) -> list[nn.Module]:
        model = zq.load(str(out))
        return [model.get_submodule(self.skeleton.block_prefix(i)) for i in range(len(self.blocks))]

    @torch.no_grad()
    def run(self, blocks: list[nn.Module], hidden: torch.Tensor, first: int, batch: int = -1) -> torch.Tensor:
        """Through `blocks`, of which the first has the number `first`."""
        for i, block in enumerate(blocks, first):
            hidden = run_block(block, hidden, self.captured.calls[i][batch])
        return hidden

    @torch.no_grad()
    def distance(self, output: torch.Tensor, i: int, lookahead: int, ahead: int = 0) -> float:
        """Of the output of block i from the float model's, as lkd measures it. ahead: how many of the blocks
        before it are behind the block that learns."""
        clean = self.run(self.blocks[: i + 1], self.hidden, 0)
        beyond = self.blocks[i + 1 : i + 1 + lookahead]
        a, b = (self.run(beyond, x, i + 1) for x in (output, clean))
        if i + lookahead >= len(self.blocks) and has_head(self.skeleton):
            return float(divergence(head(self.skeleton, a), head(self.skeleton, b)))
        reached = [
            self.run(self.blocks[: i + 1 + lookahead], hidden, 0, batch)
            for batch, hidden in enumerate(self.captured.hidden)
        ]
        weights = token_weights(torch.cat(reached), "normalised")  # they come from the targets of all windows
        return float(weighted_mse(a, b, weights[-len(a) :]))


def _bytes(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "before", ["{gptq: {}}, {lkd: {iterations: 20}}", "{lkd-classic: {iterations: 10, rate: 0.01, batch: 8}}"]
)
@pytest.mark.parametrize("weights", ["int3:g32", "int4:g32:two-level"])
def test_it_starts_where_the_steps_before_it_ended(before: str, weights: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    _run(tmp_path / "model", tmp_path / "a", before, weights)
    _run(tmp_path / "model", tmp_path / "b", f"{before}, {{lkd: {{iterations: 0}}}}", weights)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")


def test_stochastic_rounding_is_a_start_too(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    before = "{rtn: {rounding: stochastic}}"
    start = _run(tmp_path / "model", tmp_path / "a", before)
    _run(tmp_path / "model", tmp_path / "b", f"{before}, {{lkd: {{iterations: 0}}}}")
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    more = _run(tmp_path / "model", tmp_path / "c", f"{before}, {{lkd: {{iterations: 40}}}}")
    last = [list(report["output_error"].values())[-1] for report in (start, more)]
    assert last[1] < 0.7 * last[0]


@pytest.mark.parametrize(
    ("weights", "proxy", "most"),
    [
        ("e4m3fn:channel", "", 0.95),
        ("e2m1fn:g32", "", 0.9),
        ("nf3:b64", "", 0.8),
        ("kmeans3:channel", "", 0.9),
        ("int3:rank1", "", 0.9),
        ("int3:b64:pow2=16", "", 0.9),
        ("int3:b64:center", "", 0.8),
        ("int3:g32", "{proxy: {share: 0.05}}, ", 0.8),
    ],
)
def test_every_format_learns(weights: str, proxy: str, most: float, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    start = _run(tmp_path / "model", tmp_path / "a", f"{proxy}{{rtn: {{}}}}", weights, "zq")
    end = _run(
        tmp_path / "model",
        tmp_path / "b",
        f"{proxy}{{rtn: {{}}}}, {{lkd: {{iterations: 40}}}}",
        weights,
        "zq",
    )
    last = [list(report["output_error"].values())[-1] for report in (start, end)]
    assert last[1] < most * last[0]


def test_every_step_gets_its_batch_or_a_note_says_what_it_gets(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    seen: dict[str, list[int]] = {}

    def told(steps: str, samples: int) -> list[str]:
        text = RECIPE.replace("STEPS", steps).replace("WEIGHTS", "int4:g32").replace("96", str(samples))
        plan = make_plan(tmp_path / "model", Recipe.parse(text))
        return [note for note in plan.notes if "batches" in note]

    del seen
    assert told("{rtn: {}}, {lkd: {}}", 96) == []
    assert told("{lkd: classic}, {lkd: {batch: 4}}", 96) == []
    assert told("{lkd: classic}", 8) == [
        "lkd-classic learns from batches of 8 windows, of 8, where it asks for 32"
    ]
    (note,) = told("{lkd: classic}, {lkd: {batch: 12}}", 96)
    assert note.startswith("lkd-classic learns from batches of 24 windows")


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(family: str, tmp_path: Path, monkeypatch) -> None:
    """Rounded to nearest first, so the smallest batch that a step asks for decides nothing else."""
    save_tiny(family, tmp_path / "model")
    losses = []
    for other in ("", "{lkd: {iterations: 0, batch: 4}}, "):
        steps = f"{{rtn: {{}}}}, {other}{{lkd: {{iterations: 30, batch: 8, holdout: 0.08}}}}"
        report = _run(tmp_path / "model", tmp_path / f"out{len(losses)}", steps)
        losses.append(list(report["output_error"].values())[-1])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
