"""On a CUDA device: the same codes as on the CPU, and a checkpoint that runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zq
from tests.command import run as command
from tests.letters import save_tokenizer
from tests.tiny import TINY, save_tiny, token_ids
from zq.numerics.qtensor import fake_quantize_tokens, quantize
from zq.optim import AdamW
from zq.pipeline import quantize as run
from zq.plan import make_plan
from zq.quantizers.method import _add_gram
from zq.recipe import Recipe
from zq.spec import TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RECIPE = """
rules: [{match: '*', weights: 'int4:g32', activations: 'int8:token'}]
calibration: {source: random, samples: 4, length: 16}
"""


@pytest.mark.parametrize(
    "text",
    [
        *("int4:g64", "int8:channel", "int4:g64:asym", "e4m3fn:channel", "e2m1fn:b64", "dynamic4:b64"),
        *("nf3:g64", "e2m1paper:b64", "linear5:channel", "int4:g64:pow2=16", "dynamic8:rank1"),
    ],
)
def test_codes_equal_those_of_the_cpu(text: str) -> None:
    x = torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
    spec = TensorSpec.parse(text)
    here, there = quantize(x, spec), quantize(x.cuda(), spec)
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.scale, there.scale.cpu())


@pytest.mark.parametrize(
    "text", ["quantile4:b64", "kmeans3:channel", "int4:b64:center", "ulinear4:b64:center"]
)
def test_what_is_estimated_is_nearly_that_of_the_cpu(text: str) -> None:
    """Sums run in another order."""
    x = torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
    spec = TensorSpec.parse(text)
    here, there = quantize(x, spec).dequantize(), quantize(x.cuda(), spec).dequantize().cpu()
    assert float(torch.isclose(here, there, atol=1e-4).float().mean()) > 0.999


@pytest.mark.parametrize("states", [None, {"exp_avg_sq": "factored"}, {"rounding": "stochastic"}])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_optimizers_step_as_on_the_cpu(bits: int, states: dict | None) -> None:
    if bits == 32 and states:
        return
    start = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    params = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.cuda())]
    optimizers = [AdamW([p], lr=0.01, bits=bits, states=states) for p in params]
    for step in range(5):
        grad = torch.randn(300, 200, generator=torch.Generator().manual_seed(step))
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = grad.to(p.device)
            optimizer.step()
    difference = (params[0] - params[1].cpu()).abs()
    noise = 1e-2 if bits == 4 else 2e-3  # the devices draw other random numbers
    assert float(difference.mean()) < (noise if states == {"rounding": "stochastic"} else 1e-5)


def test_token_quantization_equals_that_of_the_cpu() -> None:
    x = torch.randn(33, 192, generator=torch.Generator().manual_seed(0))
    spec = TensorSpec.parse("int8:token")
    assert torch.equal(fake_quantize_tokens(x, spec), fake_quantize_tokens(x.cuda(), spec).cpu())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert-model"])
def test_quantize_and_run(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    plan = make_plan(tmp_path / "model", Recipe.parse(RECIPE), device="cuda")
    report = run(plan, tmp_path / "out").report
    assert report["audit"]["passed"]
    ids = token_ids(2, 16, 0)
    with torch.no_grad():
        on_cpu = zq.load(str(tmp_path / "out"))(ids)[0]
        on_gpu = zq.load(str(tmp_path / "out"), device="cuda")(ids.cuda())[0].cpu()
    assert (on_cpu - on_gpu).abs().max() < 0.02 * on_cpu.abs().max()


STEPS = {
    "lkd": "{gptq: {scale: mse-signed}}, {lkd: {iterations: 12, batch: 4, lookahead: LOOK}}",
    "smooth": "{smoothquant: {}}, {awq: {windows: 4}}, {gptq: {}}",
    "classic": "{lkd-classic: {iterations: 3, batch: 4}}",
    "classic in 8 bits": "{lkd-classic: {iterations: 3, batch: 4, gradients: int8, optimizer: {bits: 8}}}",
    "lorc": "{gptq: {asymmetry: 0.5}}, {lorc: {rank: 4}}",
    "integers": "{rtn: {}}, {lkd: {iterations: 12, batch: 4, lookahead: 0, gradients: int8}}",
    "small": "{gptq: {asymmetry: 0.5}}, {lkd: {iterations: 2, batch: 1, lookahead: 1}}",
}
LONG = """
rules: [{match: '*', weights: 'int4:g32', activations: 'int8:token'}]
steps: [STEPS]
calibration: {source: random, samples: 12, length: 16, generated: WRITTEN}
"""


def _run_on_gpu(family: str, folder: Path, steps: str) -> dict:
    save_tiny(family, folder / "model", torch.bfloat16)
    text = LONG.replace("STEPS", steps).replace("WRITTEN", "0" if "bert" in family else "4")
    plan = make_plan(folder / "model", Recipe.parse(text), device="cuda")
    return run(plan, folder / "out").report


@pytest.mark.parametrize("look", ["0", "2"])
@pytest.mark.parametrize("family", list(TINY))
def test_learned_rounding_is_recorded_for_every_family(family: str, look: str, tmp_path: Path) -> None:
    report = _run_on_gpu(family, tmp_path, STEPS["lkd"].replace("LOOK", look))
    assert report["audit"]["passed"]
    for loss in report["held_out_loss"].values():
        assert loss["end"] <= loss["start"]


@pytest.mark.parametrize("steps", ["smooth", "classic", "classic in 8 bits", "lorc"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert"])
def test_other_steps(family: str, steps: str, tmp_path: Path) -> None:
    assert _run_on_gpu(family, tmp_path, STEPS[steps])["audit"]["passed"]


def test_a_recorded_step_is_the_step(tmp_path: Path) -> None:
    """Twelve iterations as a graph leave what twelve plain ones leave."""
    from zq.distill import lkd

    _run_on_gpu("llama", tmp_path / "a", STEPS["lkd"].replace("LOOK", "0"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lkd, "recorded", lambda step, device: step)
        _run_on_gpu("llama", tmp_path / "b", STEPS["lkd"].replace("LOOK", "0"))
    a, b = ((tmp_path / x / "out" / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


def test_recorded_random_numbers_follow_the_seed(tmp_path: Path) -> None:
    """Gradients are rounded at random inside a graph; what was drawn before the run does not matter."""
    torch.cuda.manual_seed(1)
    _run_on_gpu("llama", tmp_path / "a", STEPS["integers"])
    torch.cuda.manual_seed(2)
    before = torch.cuda.get_rng_state()
    _run_on_gpu("llama", tmp_path / "b", STEPS["integers"])
    assert torch.equal(torch.cuda.get_rng_state(), before)
    a, b = ((tmp_path / x / "out" / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


@pytest.mark.parametrize("family", list(TINY))
def test_recorded_passes_are_the_passes(family: str, tmp_path: Path) -> None:
    """Twelve batches and more, one recording, as many plain runs: the same bytes."""
    from zq.models import replay

    _run_on_gpu(family, tmp_path / "a", STEPS["small"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "FEWEST", 1000)
        _run_on_gpu(family, tmp_path / "b", STEPS["small"])
    a, b = ((tmp_path / x / "out" / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


def test_a_rotated_model(tmp_path: Path) -> None:
    assert _run_on_gpu("qwen3", tmp_path, "{rotate: {}}, {gptq: {}}")["audit"]["passed"]


def test_gram_matrices_are_those_of_float32() -> None:
    x = torch.randn(512, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(96, 96, device="cuda")
    _add_gram(total, x.cuda())
    exact = x.double().T @ x.double()
    assert (total.cpu().double() - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_sweep_in_two_processes_writes_what_the_cpu_writes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    grid = ("--bits", "3,4", "--types", "int,nf", "--blocks", "64", "--windows", "4", "--length", "32")
    found = []
    for devices in ("cpu", "cuda:0,cuda:0"):
        out = tmp_path / devices.partition(":")[0]
        command("sweep", tmp_path / "llama", *grid, "--devices", devices, "-o", out).ok()
        lines = (out / "results.jsonl").read_text().splitlines()
        found.append({row["cell"]["spec"]: row for row in map(json.loads, lines)})
    here, there = found
    assert here.keys() == there.keys()
    for spec, row in here.items():
        assert there[spec]["bytes"] == row["bytes"]
        assert there[spec]["kl"] == pytest.approx(row["kl"], rel=0.02, abs=1e-6)
