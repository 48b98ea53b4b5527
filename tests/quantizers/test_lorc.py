"""LoRC: its factors against the optimum, and what is written against what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import zq
from tests.simulate import outputs, stop_after
from tests.tiny import TINY, save_tiny, token_ids
from zq.cli.inspect import describe
from zq.errors import AuditError, ZqError
from zq.export import compressed_tensors, native
from zq.numerics.metrics import tensor_hash
from zq.numerics.qtensor import QTensor, quantize
from zq.pipeline import quantize as run
from zq.plan import make_plan
from zq.quantizers.gptq import factorise
from zq.quantizers.lorc import factors
from zq.recipe import Recipe
from zq.spec import Scheme, TensorSpec

shapes = st.tuples(st.integers(2, 20), st.integers(2, 20))


def _problem(n: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """An error [n, k], a Hessian [k, k], and its root L with L L^T = H + damping, all float64."""
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(n, k, generator=generator, dtype=torch.float64)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64) + 2 * torch.eye(k)
    x = torch.randn(5 * k, k, generator=generator, dtype=torch.float64) * torch.logspace(0, 1, k) @ mix
    hessian = x.T @ x
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(k)
    return error, hessian, torch.linalg.cholesky(damped)


@given(shapes, st.integers(0, 99), st.data())
def test_the_factors_reach_the_optimum(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    """What is left has exactly the singular values that a truncated decomposition leaves (Eckart, Young)."""
    error, hessian, root = _problem(*shape, seed)
    rank = data.draw(st.integers(1, min(shape)))
    for upper, scale in ((None, torch.eye(shape[1])), (factorise(hessian, 0.01, "natural").upper, root)):
        a, b = factors(error, rank, upper)
        assert a.shape == (shape[0], rank)
        assert b.shape == (rank, shape[1])
        left = ((error - a @ b) @ scale.double()).square().sum()
        best = torch.linalg.svdvals(error @ scale.double())[rank:].square().sum()
        total = (error @ scale.double()).square().sum()
        assert abs(left - best) < 1e-9 * total
        assert torch.allclose(a.norm(dim=0), b.norm(dim=1)), "both factors carry the same share"


def test_each_weighting_is_best_at_what_it_minimises() -> None:
    error, hessian, _ = _problem(40, 32, 1)
    plain, weighted = (a @ b for a, b in (factors(error, 4), factors(error, 4, _upper(hessian))))

    def in_outputs(d: Tensor) -> float:
        return float((d @ hessian * d).sum())

    assert in_outputs(error - weighted) < 0.9 * in_outputs(error - plain)
    assert (error - plain).square().sum() < (error - weighted).square().sum()
    assert in_outputs(error - plain) < in_outputs(error)


def _upper(hessian: Tensor) -> Tensor:
    return factorise(hessian, 0.01, "natural").upper


def test_an_error_of_low_rank_or_none_leaves_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(12, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    a, b = factors(error, 3)
    assert torch.allclose(a @ b, error, atol=1e-5)
    a, b = factors(torch.zeros(6, 4), 2)
    assert bool((a @ b == 0).all())


def test_the_format_packs_the_factors_and_dequantizes_their_sum() -> None:
    scheme, generator = Scheme.parse("int4:g32:lorc=3 @ int8:token"), torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator)
    q = quantize(weight, scheme.weights)
    a, b = torch.randn(24, 3, generator=generator), torch.randn(3, 64, generator=generator)
    whole = QTensor(q.codes, q.scale, None, None, q.spec, a.bfloat16(), b.bfloat16())
    expected = q.dequantize() + a.bfloat16().float() @ b.bfloat16().float()
    assert torch.allclose(whole.dequantize(), expected, atol=1e-5)
    packed = native.pack("n", whole, scheme)
    assert [(s.name, s.shape) for s in native.slots("n", scheme, (24, 64), torch.bfloat16)] == [
        (name, tuple(tensor.shape)) for name, tensor in packed.items()
    ]
    back = native.unpack("n", packed.__getitem__, scheme, (24, 64))
    assert torch.equal(back.dequantize(), whole.dequantize())
    assert "low-rank" in (compressed_tensors.refuse(scheme, (24, 64), False, torch.float32) or "")


RECIPE = """
rules: [{match: '*', weights: 'WEIGHTS', activations: 'int8:token'}]
steps: [STEPS]
calibration: {source: random, samples: 8, length: 16}
"""


def _recipe(steps: str, weights: str = "int3:g32") -> Recipe:
    return Recipe.parse(RECIPE.replace("STEPS", steps).replace("WEIGHTS", weights))


@pytest.mark.parametrize("name", TINY)
def test_reloaded_it_is_the_model_that_was_measured(name: str, tmp_path: Path) -> None:
    """Every family: zq.load computes, to the bit, with the dense weights whose hashes are in the report."""
    save_tiny(name, tmp_path / "model", torch.bfloat16)
    plan = make_plan(tmp_path / "model", _recipe("{rtn: {}}, {lorc: {rank: 4}}"))
    report = run(plan, tmp_path / "out").report
    assert report["format"] == "zq"
    model = zq.load(tmp_path / "out")
    for layer, measured in report["layers"].items():
        assert measured["scheme"] == "int3:g32:lorc=4 @ int8:token"
        dense = model.get_submodule(layer).dense(torch.bfloat16)
        assert tensor_hash(dense) == measured["dequantized_sha256"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    quantized = [n for n in tensors if any(n.startswith(f"{layer}.weight_") for layer in report["layers"])]
    weights = sum(math.prod(layer.shape) for layer in plan.layers if layer.scheme)
    assert report["bits_per_weight"] == 8 * sum(tensors[n].nbytes for n in quantized) / weights
    assert describe(tmp_path / "out")["schemes"].keys() == {"int3:g32:lorc=4 @ int8:token"}


def test_transformers_loads_it_too(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    run(make_plan(tmp_path / "model", _recipe("{gptq: {}}, {lorc: {}}")), tmp_path / "out")
    ours, theirs = zq.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(theirs.eval(), token_ids()), outputs(ours, token_ids()))


def test_the_error_falls_with_the_rank_and_weighting_by_the_hessian_helps(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    errors = []
    for i, step in enumerate(("", "rank: 4", "rank: 16", "rank: 32", "rank: 16, weighting: none")):
        recipe = _recipe("{gptq: {}}" + (step and f", {{lorc: {{{step}}}}}"))
        report = run(make_plan(tmp_path / "model", recipe), tmp_path / str(i)).report
        errors.append(list(report["output_error"].values())[-1])
    assert errors[:4] == sorted(errors[:4], reverse=True)
    assert errors[3] < 0.5 * errors[0]
    assert errors[2] < errors[4] < errors[0]


def test_the_full_rank_leaves_no_error(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path / "model")  # no weight of it has a side below 64
    text = str(_recipe("{rtn: {}}, {lorc: {rank: 64}}", "int2:channel"))
    recipe = Recipe.parse(text.replace("  activations: int8:token\n", ""))
    report = run(make_plan(tmp_path / "model", recipe), tmp_path / "out").report
    assert max(report["output_error"].values()) < 1e-9


def test_twice_and_resumed_the_same_bytes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", torch.bfloat16)

    def plan():
        return make_plan(tmp_path / "model", _recipe("{gptq: {}}, {lorc: {rank: 3}}"))

    run(plan(), tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(plan(), tmp_path / "b", progress=stop_after(2))
    run(plan(), tmp_path / "b", resume=True)
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


def test_a_factor_that_is_not_finite_fails_the_audit(tmp_path: Path, monkeypatch) -> None:
    import zq.pipeline as pipeline

    save_tiny("llama", tmp_path / "model")

    def broken(plan, folder, done):
        file = folder / plan.shards[0].file
        header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
        begin = header["model.layers.0.mlp.up_proj.weight_lorc_b"]["data_offsets"][0]
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little") + begin
        with file.open("r+b") as opened:
            opened.seek(start)
            opened.write(b"\xff\xff\xff\x7f")
        return real(plan, folder, done)

    real = pipeline.audit
    monkeypatch.setattr(pipeline, "audit", broken)
    with pytest.raises(AuditError, match=r"up_proj\.weight_lorc_b' holds a low-rank factor with NaN"):
        run(make_plan(tmp_path / "model", _recipe("{rtn: {}}, {lorc: {}}")), tmp_path / "out")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("{lorc: {}}", "put it once, as the last step, after rtn or gptq"),
        ("{rtn: {}}, {lorc: {}}, {lorc: {}}", "put it once, as the last step"),
        ("{rtn: {}}, {lorc: {}}, {gptq: {}}", "put it once, as the last step"),
        ("{rtn: {}}, {lorc: {rank: 0}}", "'rank: 0' of step 'lorc' is not allowed; give from 1 to 64"),
        (
            "{rtn: {}}, {lorc: {rank: 33}}",
            "k_proj': 'rank: 33' of step 'lorc' is not allowed; give from 1",
        ),
        ("{rtn: {}}, {lorc: {weighting: best}}", "allowed: hessian, none"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(steps: str, message: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ZqError, match=message):
        make_plan(tmp_path, _recipe(steps))


def test_formats_and_rules_that_cannot_have_it(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    recipe = Recipe.parse(str(_recipe("{rtn: {}}, {lorc: {}}")).replace("auto", "compressed-tensors"))
    with pytest.raises(ZqError, match="has no low-rank corrections; use --to zq"):
        make_plan(tmp_path, recipe)
    with pytest.raises(ZqError, match="a rule gives no rank; drop 'lorc=8' and add the step"):
        _recipe("{rtn: {}}", "int4:g32:lorc=8")
    with pytest.raises(ZqError, match="are not supported"):
        Scheme.parse("int4:g32 @ int8:token:lorc=2")
    assert str(TensorSpec.parse("int4:g32:lorc=12")) == "int4:g32:lorc=12"
