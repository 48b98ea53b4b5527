"""On a CUDA device: attention over a cache and what fills it, against their references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.attention_smoke import cases, moved
from tests.kernels.inputs import BF16, FP8, FP16
from tests.kernels.inputs_kv import attention_args, in_parts, store_args, text_args, token_args
from tests.kernels.near_kv import worst, worst_text
from zq.kernels import ops, reference  # noqa: F401  (registers the operators)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Z = torch.ops.zq


def test_attention() -> None:
    for name, args in cases():
        here = moved(args)
        found = Z.decode_attention(*here)
        assert worst(found, here) <= 1, name
        assert torch.equal(found, Z.decode_attention(*here)), name


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_a_row_does_not_depend_on_its_batch(kv) -> None:
    spans = [(0, 2999), (3, 9), (700, 1301), (0, 600)] * 16
    here = moved(attention_args((64, 8, 2, 3000, 128), kv, spans=spans))
    whole = Z.decode_attention(*here)
    for row in range(4):
        alone = (*(x if x is None else x[row : row + 1] for x in here[:7]), *here[7:])
        assert torch.equal(Z.decode_attention(*alone)[0], whole[row])


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotary": 24},
        {"rope": "interleaved", "rotary": 16},
        {"rope": "none"},
        {"wide": False},
        {"tokens": 7},
        {"tokens": 7, "rope": "none"},
        {"tokens": 7, "rope": "interleaved", "rotary": 16},
    ],
)
def test_store(kv, dtype, options) -> None:
    for shape in ((5, 32, 8, 40, 128), (3, 4, 4, 9, 80), (300, 2, 1, 7, 64)):
        args = store_args(shape, kv, dtype, **options)
        here = moved(args)
        assert torch.equal(Z.store_kv(*here).cpu(), Z.store_kv(*args))
        for a, b in zip(here[1:5], args[1:5], strict=True):
            assert a is b is None or torch.equal(a.cpu().float().nan_to_num(3), b.float().nan_to_num(3))


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
@pytest.mark.parametrize("to", [torch.int8, FP8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotary": 24, "norms": True},
        {"rope": "interleaved", "rotary": 16},
        {"rope": "none", "alibi": True},
    ],
)
def test_a_token_is_its_parts(kv, to, options) -> None:
    """To the bit, three times: counters are as before."""
    for shape in ((5, 32, 8, 640, 128), (1, 32, 8, 5000, 128), (3, 72, 8, 300, 80), (40, 12, 1, 1300, 64)):
        args = token_args(shape, kv, to=to, **options)
        other = moved(args)
        wanted = [*in_parts(other, Z.store_kv, Z.decode_attention), *other[1:5]]
        for _ in range(3):
            here = moved(args)
            for a, b in zip((*Z.attend_token(*here), *here[1:5]), wanted, strict=True):
                assert a is b is None or torch.equal(a.float().nan_to_num(3), b.float().nan_to_num(3))


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_a_graph_of_both_reads_its_positions_from_the_device(kv) -> None:
    """Every replay stores one token and attends to those so far."""
    length, rows = 300, 3
    args = store_args((rows, 8, 2, length, 64), kv, rope="none")
    here = list(moved(args))
    position, first = here[5].zero_(), torch.zeros(rows, dtype=torch.int32, device="cuda")
    last = torch.zeros(rows, dtype=torch.int32, device="cuda")

    def step() -> Tensor:
        q = Z.store_kv(*here)
        return Z.decode_attention(q, *here[1:5], first, last, 0.125, None)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    for at in (0, 1, 2, 130, 299):
        position.fill_(at)
        last.fill_(at)
        for x in here[1:3]:
            x.view(torch.uint8 if kv else torch.int16)[:, :, : at + 1] = 1  # numbers, not NaN
        for x in here[3:5]:
            if x is not None:
                x.fill_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        wide = (made[:0], *here[1:5])
        assert made.isfinite().all()
        again = Z.decode_attention(Z.store_kv(*here), *wide[1:], first, last, 0.125, None)
        assert torch.equal(made, again)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_texts(masked, causal, dtype) -> None:
    """Rows near the reference, their codes to the bit, the cache, and that a row of the batch does not
    matter to the others; again and again the same."""
    shapes = [
        (3, 12, 12, 128, 64),
        (2, 16, 4, 200, 128),
        (5, 9, 3, 65, 48),
        (3, 1, 1, 1, 16),
        (2, 25, 25, 70, 64),
    ]
    for shape in (*shapes, (64, 16, 16, 128, 64), (2, 12, 12, 512, 64)):
        args = moved(text_args(shape, dtype, causal, masked, kept=not masked))
        found = Z.attend_text(*args)
        assert worst_text(found, args) <= 1, shape
        if not masked:
            for x, kept in zip(args[1:3], args[4:6], strict=True):
                assert torch.equal(kept[:, :, : shape[3]], x.transpose(1, 2))
                kept.fill_(torch.nan)
        alone = (*(x[:1] for x in args[:3]), None if args[3] is None else args[3][:1], None, None, *args[6:])
        assert torch.equal(Z.attend_text(*alone), found[: shape[3]])
        if shape[1] > 16:
            continue
        for to in (torch.int8, FP8):
            wanted = reference.codes(found, to)
            for _ in range(3):
                for a, b in zip(Z.attend_text_codes(*args, to), wanted, strict=True):
                    assert torch.equal(a.float(), b.float()), (shape, to)
        if not masked:
            for x, kept in zip(args[1:3], args[4:6], strict=True):
                assert torch.equal(kept[:, :, : shape[3]], x.transpose(1, 2))
