"""LKD as published: what it learns, from which inputs, and that its steps are AdamW's on the stated loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny
from zq.checkpoint.index import read_index
from zq.checkpoint.reader import reader
from zq.distill import classic, integer
from zq.distill.integer import Precision
from zq.errors import ZqError
from zq.models.capture import capture_inputs, run_block
from zq.numerics.qtensor import fake_quantize_tokens, quantize
from zq.pipeline import quantize as run
from zq.plan import make_plan
from zq.quantizers.method import Block, Layer
from zq.recipe import Recipe
from zq.spec import Scheme, TensorSpec

RECIPE = """
rules: [{match: '*', weights: 'int4:g32', activations: 'int8:token'}]
steps: [STEPS]
calibration: {source: random, samples: 32, length: 16}
"""


def _plan(folder: Path, steps: str):
    return make_plan(folder, Recipe.parse(RECIPE.replace("STEPS", steps)))


def _block(folder: Path) -> Block:
    plan = _plan(folder, "rtn")
    skeleton, read = plan.skeleton, reader(plan.index)
    skeleton.load_outside(read)
    assert plan.windows is not None
    captured = capture_inputs(skeleton, [plan.windows])
    skeleton.load_block(0, read)
    module, calls = skeleton.block(0), captured.calls[0]
    scheme = Scheme.parse("int4:g32 @ int8:token")
    layers = [
        Layer(i.name, i.kind, skeleton.model.get_submodule(i.name), i.transposed, scheme)
        for i in skeleton.linears(0)
    ]
    block = Block(skeleton.block_prefix(0), module, layers, plan.dtype, 0)
    with torch.no_grad():
        block.targets = [run_block(module, captured.hidden[0], calls[0])]
    block.inputs, block.calls = [torch.full_like(captured.hidden[0], torch.nan)], calls
    block.teacher_inputs = captured.hidden
    return block


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_it_is_adamw_on_the_mse_of_the_float_inputs(family: str, tmp_path: Path, monkeypatch) -> None:
    """Against the same training written out on a copy of the module; NaN as quantized inputs shows that they
    are not read."""
    save_tiny(family, tmp_path)
    in_order = lambda windows, size, count, seed: torch.arange(windows).expand(count, -1)  # noqa: E731
    monkeypatch.setattr(classic, "shuffled", in_order)
    block, twin = _block(tmp_path), _block(tmp_path)
    options = classic.Options(iterations=3, rate=1e-3)
    before = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    with torch.no_grad():
        classic.run(block, options)

    module = twin.module
    weights = {f"{layer.name.removeprefix(twin.name + '.')}.weight": layer for layer in twin.layers}
    held = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(held.values(), lr=1e-3, weight_decay=0.01)
    spec, tokens = TensorSpec.parse("int4:g32"), TensorSpec.parse("int8:token")

    def straight(p, rounded):
        return p + (rounded - p).detach()

    for layer in twin.layers:
        layer.module.register_forward_pre_hook(
            lambda m, a: straight(a[0], fake_quantize_tokens(a[0], tokens))
        )
    call = twin.calls[0]
    for _ in range(3):
        used = {}
        for name, p in held.items():
            if name in weights:
                dense = p.detach().T if weights[name].transposed else p.detach()
                rounded = quantize(dense, spec, "absmax", torch.float32).dequantize()
                used[name] = straight(p, rounded.T if weights[name].transposed else rounded)
            else:
                used[name] = p
        given = (twin.teacher_inputs[0], *call["args"])
        out = torch.func.functional_call(module, used, given, call["kwargs"])
        out = out[0] if isinstance(out, tuple) else out
        loss = (out - twin.targets[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for name, p in block.module.named_parameters():
        if name not in weights:
            assert torch.allclose(p, held[name], atol=1e-5), name
            assert not torch.equal(p, before[name])
            assert f"{block.name}.{name}" in block.changed
    for ours, theirs in zip(block.layers, twin.layers, strict=True):
        name = f"{theirs.name.removeprefix(twin.name + '.')}.weight"
        dense = held[name].detach().T if theirs.transposed else held[name].detach()
        wanted = quantize(dense, spec, "absmax", twin.scale_dtype)
        assert ours.quantized is not None
        same = (ours.quantized.codes == wanted.codes).float().mean()
        assert same > 0.999, ours.name


def test_a_run_writes_what_was_learned(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    plan = _plan(tmp_path / "model", "{lkd: classic}")
    assert "changed by lkd-classic" in next(
        row["why"] for row in plan.rows() if row["name"].endswith("0.input_layernorm.weight")
    )
    report = run(plan, tmp_path / "out").report
    changed = {name for names in report["changed"].values() for name in names}
    assert "model.layers.1.post_attention_layernorm.weight" in changed
    assert "model.norm.weight" not in changed
    old, new = read_index(tmp_path / "model"), read_index(tmp_path / "out")
    for name in changed:
        a, b = (reader(index)([name])[name] for index in (old, new))
        assert not torch.equal(a, b)
        assert torch.allclose(a, b, atol=1e-3)
    wanted = {"start", "end", "optimizer_bytes"}
    assert all(set(facts) == wanted for facts in report["training_loss"].values())


def test_quantized_optimizer_states_learn_as_well(tmp_path: Path) -> None:
    """Within the spread of the loss over seeds, with states of a quarter and an eighth of the size."""
    save_tiny("llama", tmp_path / "model")

    def trained(bits: int, seed: int) -> tuple[float, int]:
        steps = f"{{lkd-classic: {{iterations: 30, rate: 0.001, optimizer: {{bits: {bits}}}}}}}"
        text = RECIPE.replace("STEPS", steps) + f"seed: {seed}\n"
        plan = make_plan(tmp_path / "model", Recipe.parse(text))
        report = run(plan, tmp_path / f"{bits}-{seed}").report
        nbytes = sum(facts["optimizer_bytes"] for facts in report["training_loss"].values())
        return next(iter(report["output_error"].values())), nbytes

    base = [trained(32, seed) for seed in range(3)]
    plain = run(_plan(tmp_path / "model", "{lkd-classic: {iterations: 0}}"), tmp_path / "plain").report
    gain = next(iter(plain["output_error"].values())) - base[0][0]
    spread = max(error for error, _ in base) - min(error for error, _ in base)
    assert gain > 0
    nbytes = [base[0][1]]
    for bits in (8, 4):
        error, size = trained(bits, 0)
        assert abs(error - base[0][0]) < max(spread, 0.1 * gain)
        nbytes.append(size)
    assert (
        nbytes[0] > 1.9 * nbytes[1] > 1.9 * nbytes[2]
    )  # half of this tiny block is too small to be quantized


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_integer_gradients_and_states_of_8_bits_together(family: str, tmp_path: Path, monkeypatch) -> None:
    """Every gradient of a layer is an integer product, and the block learns as with float ones."""
    save_tiny(family, tmp_path / "model")
    products: list[Precision] = []
    encode = integer.encode

    def counted(x: torch.Tensor, precision: Precision, **options: bool) -> integer.Operand:
        products.append(precision)
        return encode(x, precision, **options)

    monkeypatch.setattr(integer, "encode", counted)

    def left(options: str) -> tuple[float, int]:
        steps = f"{{lkd-classic: {{iterations: 30, rate: 0.001{options}}}}}"
        report = run(_plan(tmp_path / "model", steps), tmp_path / f"out{len(options)}").report
        facts = report["training_loss"].values()
        return sum(report["output_error"].values()), sum(each["optimizer_bytes"] for each in facts)

    start = sum(
        run(_plan(tmp_path / "model", "{lkd-classic: {iterations: 0}}"), tmp_path / "rtn")
        .report["output_error"]
        .values()
    )
    base, wide = left("")
    assert not products
    error, narrow = left(", gradients: int8, optimizer: {bits: 8}")
    assert products
    assert {p.bits for p in products} == {8}
    assert narrow < 0.6 * wide
    assert error != base
    assert (
        start - error > 0.7 * (start - base) > 0
    )  # 0.73 to 1.2 over three seeds, so is 8 bits of states alone


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("8", "must be a mapping with bits or states"),
        ("{bit: 8}", "'bit' of 'optimizer' is unknown; allowed: bits, states"),
        ("{bits: 16}", "bits=16 is not allowed; allowed: 32, 8, 4"),
        ("{bits: 8, states: {exp_avg: magic:b64}}", "format 'magic' is unknown"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_with_its_line(
    optimizer: str, words: str, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(ZqError, match=r"^recipe:3: ") as caught:
        _plan(tmp_path / "model", f"{{lkd-classic: {{optimizer: {optimizer}}}}}")
    assert words in str(caught.value)


def test_without_iterations_it_is_rounding_to_nearest(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path / "model")
    for out, steps in (("a", "{rtn: {scale: absmax}}"), ("b", "{lkd-classic: {iterations: 0}}")):
        run(_plan(tmp_path / "model", steps), tmp_path / out)
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


def test_a_training_that_diverges_says_so(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", torch.float16)
    plan = _plan(tmp_path / "model", "{lkd-classic: {iterations: 100, rate: 1.0, decay: 0.0}}")
    with pytest.raises(ZqError, match=r"^'model\.layers\.0\.\S+': step lkd-classic .* smaller 'rate'"):
        run(plan, tmp_path / "out")
