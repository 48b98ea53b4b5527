"""How many operators a decode step and a post-norm block are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import zq
from tests.runtime.quantized import W4A8, W8A8, distance, force_kernels, quantized
from tests.runtime.stepping import Seen, generated, padded, stepping
from tests.tiny import TINY, random_model, token_ids

LLAMA_LAYER = Counter(
    {
        "zq.add_rms_norm_quant": 2,
        "zq.w4a8_int8_group": 4,
        "zq.attend_token": 1,
        "zq.silu_mul_quant": 1,
    }
)
LLAMA_AROUND = Counter(
    {
        "aten.embedding": 1,
        "aten.copy_": 1,  # the present position
        "aten.index_select": 1,  # cosine and sine
        "aten.add": 1,  # of the last block
        "aten._fused_rms_norm": 1,
        "aten.mm": 1,  # the head
        "aten._foreach_add_": 1,  # lengths of all layers
    }
)


def test_a_llama_of_w4a8_in_eight_operators_a_layer(steps: list[Any]) -> None:
    """And seven around them, whatever the number of layers and rows."""
    counted = []
    for layers in (2, 5):
        model, _ = stepping("llama", W4A8, num_hidden_layers=layers)
        generated(model, 4, **padded())
        own, ops = steps[-1]
        assert own
        ops = fused_norm(ops)
        ops["zq.add_rms_norm_quant"] += ops.pop("zq.rms_norm_quant")  # the first has nothing to add
        counted.append(ops)
    assert {name: count // 3 for name, count in (counted[1] - counted[0]).items()} == LLAMA_LAYER
    assert sum(LLAMA_LAYER.values()) == 8
    for ops, layers in zip(counted, (2, 5), strict=True):
        assert ops - Counter({name: layers * count for name, count in LLAMA_LAYER.items()}) == LLAMA_AROUND


def fused_norm(ops: Counter[str]) -> Counter[str]:
    """torch has no kernel of rms_norm on a CPU and composes it; on CUDA it is one."""
    parts = ("aten._to_copy", "aten.mul", "aten.pow", "aten.mean", "aten.add_", "aten.rsqrt", "aten.rsqrt_")
    known = Counter({name: count for name, count in ops.items() if name not in parts})
    known["aten._fused_rms_norm"] = 1 if ops["aten.pow"] + ops["aten._fused_rms_norm"] == 1 else 99
    return known


@pytest.mark.parametrize(
    ("name", "layer", "around"),
    [
        ("llama", 8, 7),
        ("qwen3", 8, 7),
        ("gpt2", 8, 8),  # positions are embedded, too
        ("opt", 9, 9),  # ReLU has no operator; positions begin at 2
        ("gptj", 8, 7),
        ("gpt_neox", 9, 7),
        ("gpt_neox-serial", 8, 7),
        ("bloom", 8, 8),  # a norm of the embeddings
    ],
)
def test_operators_of_a_step(name: str, layer: int, around: int, steps: list[Any]) -> None:
    model, _ = stepping(name, W4A8)
    generated(model, 3, **padded())
    own, ops = steps[-1]
    if name in ("llama", "qwen3"):
        ops = fused_norm(ops)
    assert own
    assert sum(ops.values()) <= 2 * layer + around, ops


def test_post_norm_blocks_hand_over_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine operators a block: each norm gives the next residual and its codes."""
    force_kernels(monkeypatch)
    counted = []
    for layers in (2, 4):
        config = TINY["bert-model"]()
        config.num_hidden_layers = layers
        model = zq.optimize(quantized("bert-model", W8A8, model=random_model(config, torch.bfloat16)))
        with torch.no_grad(), Seen() as seen:
            model(input_ids=token_ids())
        assert model.zq_runner.shared.handed is None
        counted.append(+seen.ops)
    more = counted[1] - counted[0]
    ours = {name: count // 2 for name, count in more.items() if name.startswith("zq.")}
    assert ours == {
        "zq.w8a8_int8": 4, "zq.quant_int8": 1, "zq.post_layer_norm_quant": 2, "zq.gelu_quant": 1
    }  # fmt: skip
    assert not any(name.startswith(("aten.add", "aten.native_layer_norm")) for name in more)


def test_rows_are_not_handed_to_other_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hook puts in the place of a block's output is what the next block sees."""
    force_kernels(monkeypatch)
    model, ids = zq.optimize(quantized("bert-model", W8A8)), token_ids()
    with torch.no_grad():
        plain = model(input_ids=ids)[0]
        handle = model.encoder.layer[0].register_forward_hook(lambda *given: given[2] * 0)
        zeros = model(input_ids=ids)[0]
        handle.remove()
        again = model(input_ids=ids)[0]
    assert torch.equal(again, plain)
    assert distance(zeros, plain) > 0.3
    assert torch.equal(zeros[0], zeros[1])
