"""Running block by block against transformers' own forward: equal bit for bit.

The reference is the model that `from_pretrained` makes, run as a user would, with its own choice of
attention; `hidden_states` are what it records between its blocks.
"""

from __future__ import annotations

import pytest
import torch

from tests.tiny import POSITIONS, TINY, VOCAB, token_ids
from zq.errors import ZqError
from zq.models.capture import capture_inputs, head, last_hidden, run_block

LENGTH = 16  # longer than the tiny models' sliding windows of 6


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_block_by_block_equals_the_whole_model(name, dtype, saved):
    stored = saved(name, dtype)
    skeleton = stored.skeleton(dtype)
    batches = [token_ids(2, LENGTH, seed=1), token_ids(1, LENGTH - 3, seed=2)]
    skeleton.load_outside(stored.read)
    captured = capture_inputs(skeleton, batches)
    skeleton.unload_outside()
    states = [[h] for h in captured.hidden]
    for i in range(skeleton.n_blocks):
        skeleton.load_block(i, stored.read)  # one block in memory at a time
        for b, trace in enumerate(states):
            trace.append(run_block(skeleton.block(i), trace[-1], captured.calls[i][b]))
        skeleton.unload_block(i)
    skeleton.load_tail(stored.read)
    for ids, trace in zip(batches, states, strict=True):
        reference = stored.reference(ids, output_hidden_states=True)
        *before, last = reference.hidden_states
        assert len(before) == skeleton.n_blocks
        for i, expected in enumerate(before):
            assert torch.equal(trace[i], expected), f"input of block {i}"
        assert torch.equal(last_hidden(skeleton, trace[-1]), last)
        if hasattr(reference, "logits"):
            assert torch.equal(head(skeleton, trace[-1]), reference.logits)


def test_capture_needs_no_block_and_no_tail_and_leaves_no_trace(saved):
    stored = saved("qwen2")
    skeleton = stored.skeleton()
    skeleton.load_outside(stored.read)
    first = capture_inputs(skeleton, [token_ids()])
    assert all(p.device.type == "meta" for p in skeleton.block(0).parameters())
    assert all("forward" not in vars(skeleton.block(i)) for i in range(skeleton.n_blocks))
    again = capture_inputs(skeleton, [token_ids()])
    assert torch.equal(first.hidden[0], again.hidden[0])
    assert not first.hidden[0].requires_grad


def test_masks_differ_by_layer(saved):
    """Qwen2 with max_window_layers=1: block 0 sees everything, blocks 1 and 2 a window of 6."""
    stored = saved("qwen2")
    skeleton = stored.skeleton()
    skeleton.load_outside(stored.read)
    calls = capture_inputs(skeleton, [token_ids(1, LENGTH)]).calls
    masks = [blocks[0]["kwargs"]["attention_mask"] for blocks in calls]
    assert masks[1] is masks[2]
    assert masks[0] is not masks[1]
    assert masks[1].shape[-2:] == (LENGTH, LENGTH)


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom", "mistral"])
def test_equal_arguments_are_stored_once(name, saved):
    stored = saved(name)
    skeleton = stored.skeleton()
    skeleton.load_outside(stored.read)

    def distinct(count: int) -> int:
        batches = [token_ids(2, LENGTH, seed=s) for s in range(count)]
        return len({id(t) for t in _tensors(capture_inputs(skeleton, batches).calls)})

    assert 0 < distinct(1) == distinct(5) <= 4


def test_no_cache_is_kept(saved):
    stored = saved("llama")
    skeleton = stored.skeleton()
    skeleton.load_outside(stored.read)
    call = capture_inputs(skeleton, [token_ids()]).calls[0][0]
    assert call["kwargs"].get("cache", call["kwargs"].get("past_key_values")) is None


def test_blocks_can_be_trained_through(saved):
    """Distillation needs gradients with respect to the input; nothing in run_block stops them."""
    stored = saved("llama")
    skeleton = stored.skeleton()
    skeleton.load_outside(stored.read)
    captured = capture_inputs(skeleton, [token_ids()])
    skeleton.load_block(0, stored.read)
    hidden = captured.hidden[0].clone().requires_grad_()
    run_block(skeleton.block(0), hidden, captured.calls[0][0]).square().mean().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "ids", "expected"),
    [
        ("llama", torch.full((1, POSITIONS + 1), 5), "sequence length 65 exceeds .* 64 positions"),
        ("roberta", torch.full((1, POSITIONS - 1), 5), "exceeds the model's 62 positions"),
        ("gpt2", torch.full((1, 4), VOCAB), "vocabulary has 160 entries"),
        ("gpt2", torch.full((1, 4), -1), "token ids reach from -1"),
        ("gpt2", torch.zeros(0, 4, dtype=torch.long), "non-empty"),
        ("gpt2", torch.zeros(4, dtype=torch.long), r"shape \[4\]"),
    ],
)
def test_bad_ids(name, ids, expected, saved):
    stored = saved(name)
    skeleton = stored.skeleton()
    skeleton.load_outside(stored.read)
    with pytest.raises(ZqError, match=expected):
        capture_inputs(skeleton, [ids])


def test_longest_sequences_fit(saved):
    for name, length in (("roberta", POSITIONS - 2), ("opt", POSITIONS), ("bloom", POSITIONS + 9)):
        stored = saved(name)
        skeleton = stored.skeleton()
        skeleton.load_outside(stored.read)
        captured = capture_inputs(skeleton, [token_ids(1, length)])
        assert captured.hidden[0].shape == (1, length, 64)


def test_no_head(saved):
    stored = saved("bert-model")
    skeleton = stored.skeleton()
    with pytest.raises(ZqError, match="BertModel has no language-model head"):
        head(skeleton, torch.zeros(1, 2, 64))
