"""On a CUDA device: the same codes as on the CPU, and a checkpoint that runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zq
from tests.tiny import save_tiny, token_ids
from zq.numerics.qtensor import fake_quantize_tokens, quantize
from zq.pipeline import quantize as run
from zq.plan import make_plan
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
    "text", ["int4:g64", "int8:channel", "int4:g64:asym", "e4m3fn:channel", "e2m1fn:b64"]
)
def test_codes_equal_those_of_the_cpu(text: str) -> None:
    x = torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
    spec = TensorSpec.parse(text)
    here, there = quantize(x, spec), quantize(x.cuda(), spec)
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.scale, there.scale.cpu())


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
