"""The operators of the cache: registered properly, checked strictly, and what transformers computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as rotate_neox
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_gptj
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tests.kernels.inputs import BF16, FP8, FP16, normal
from tests.kernels.inputs_kv import attention_args, in_parts, store_args, text_args, token_args
from tests.tiny import build_tiny
from zq.errors import ZqError
from zq.kernels import ops, reference, reference_kv
from zq.kernels.table_kv import KV_UNITS, TEXT_OUT, kv_units, text_unit

Z = torch.ops.zq
CALLS = [
    *(
        ("decode_attention", attention_args((2, 4, 2, 9, 32), kv, alibi=kv is None))
        for kv in (None, "int8", "fp8")
    ),
    *(("store_kv", store_args((3, 4, 2, 9, 32), kv, norms=kv is None)) for kv in (None, "int8", "fp8")),
    ("store_kv", store_args((3, 4, 2, 9, 32), None, rope="none")[:11]),
    ("store_kv", store_args((2, 4, 2, 9, 32), None, tokens=5)),
    *(("attend_token", token_args((2, 4, 2, 9, 32), kv, norms=True)) for kv in (None, "int8", "fp8")),
    ("attend_token", token_args((2, 4, 2, 9, 32), None, to=FP8, rope="none", alibi=True)),
    ("attend_text", text_args((2, 4, 2, 9, 32), masked=True)),
    ("attend_text", text_args((2, 4, 2, 9, 32), FP16, causal=False, kept=True)),
    ("attend_text_codes", (*text_args((2, 4, 2, 9, 32), kept=True), torch.int8)),
    ("attend_text_codes", (*text_args((2, 4, 2, 9, 32), causal=False), FP8)),
]


def test_every_operator_is_called_here():
    assert {name for name, _ in CALLS} == set(ops.KV_OPS)


def plain(args: tuple) -> tuple:
    """Without NaN, which no comparison likes, and with memory that opcheck can copy."""
    return tuple(
        x.float().nan_to_num(0.5).to(x.dtype) if isinstance(x, Tensor) and x.dtype != torch.int8 else x
        for x in args
    )


@pytest.mark.parametrize(("name", "args"), CALLS, ids=lambda value: value if isinstance(value, str) else "")
def test_opcheck(name, args):
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if args[1].dtype == FP8:  # both compare tensors in a way that torch has not for FP8
        utilities = utilities[1:3]
    torch.library.opcheck(getattr(Z, name).default, plain(args), test_utils=utilities)


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_a_step_compiles_into_one_graph(kv):
    """The cache is written before it is read."""
    args = plain(store_args((3, 4, 2, 9, 32), kv))
    begin = torch.zeros(3, dtype=torch.int32)

    def step(qkv, k, v, ks, vs, position, cos, sin):
        q = Z.store_kv(qkv, k, v, ks, vs, position, cos, sin, 4, 2, "half")
        return Z.decode_attention(q, k, v, ks, vs, begin, position.int(), 0.2, None)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    a, b = ([x.clone() if isinstance(x, Tensor) else x for x in args[:8]] for _ in range(2))
    assert torch.equal(compiled(*a), step(*b))
    for x, y in zip(a, b, strict=True):
        assert x is y is None or torch.equal(x.float(), y.float())
    assert not torch.equal(a[1].float(), args[1].float())


def oracle(args: tuple) -> Tensor:
    """One row, one head, one position at a time, in float64."""
    q, k, v, ks, vs, first, last, scale, slopes = args
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            total, weights = torch.zeros(q.shape[2], dtype=torch.float64), 0.0
            scores = []
            for at in range(int(first[row]), int(last[row]) + 1):
                key = k[row, head // group, at].double() * (
                    1 if ks is None else ks[row, head // group, at].double()
                )
                bias = 0.0 if slopes is None else float((slopes[head] * (at - int(first[row]))).to(q.dtype))
                scores.append(float(q[row, head].double() @ key) * scale + bias)
            for at, score in enumerate(scores, int(first[row])):
                value = v[row, head // group, at].double()
                value = value if vs is None else value * vs[row, head // group, at].double()
                weight = torch.tensor(score - max(scores), dtype=torch.float64).exp()
                total, weights = total + weight * value, weights + weight
            out[row, head] = total / weights
    return out


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_against_float64(kv, dtype):
    for shape, spans in (
        ((3, 4, 2, 13, 16), [(0, 12), (12, 12), (5, 11)]),
        ((1, 3, 1, 1, 48), None),
        ((2, 2, 2, 7, 80), [(0, 0), (2, 5)]),
    ):
        args = attention_args(shape, kv, dtype, spans, alibi=shape[1] == 4, size=20.0)
        assert torch.equal(Z.decode_attention(*args), oracle(args).to(dtype))


def test_equal_keys_give_the_mean_of_the_values():
    args = list(attention_args((1, 2, 1, 11, 16), None, FP16, spans=[(3, 9)]))
    args[1] = torch.ones_like(args[1])
    found = Z.decode_attention(*args)
    assert torch.allclose(found, args[2][0, 0, 3:10].double().mean(0).half().expand_as(found))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rotary_embeddings_are_those_of_transformers(dtype):
    rows, heads, d = 5, 3, 32
    x = normal(rows, heads, d, seed=1, dtype=dtype)
    for rope, rotary, theirs in (
        ("half", 32, rotate_llama),
        ("half", 12, rotate_neox),
        ("interleaved", 16, rotate_gptj),
    ):
        angle = normal(rows, rotary // 2, seed=2) * 3
        whole = torch.cat((angle, angle), -1) if rope == "half" else angle.repeat_interleave(2, -1)
        ours = reference_kv.rotate(x, whole.cos().to(dtype), whole.sin().to(dtype), rope)
        if rope == "half":
            cos, sin = (f(whole).to(dtype)[:, None] for f in (torch.cos, torch.sin))
            wanted, _ = theirs(x[:, :, None], x[:, :, None], cos, sin)
            assert torch.equal(ours, wanted[:, :, 0])
        else:
            cos, sin = (f(angle).to(dtype)[:, None] for f in (torch.cos, torch.sin))
            wanted = theirs(x[:, None, :, :rotary], sin, cos)[:, 0]
            assert torch.equal(ours, torch.cat((wanted, x[..., rotary:]), -1))


def test_norms_are_those_of_transformers():
    norm = Qwen3RMSNorm(32, 1e-6).to(BF16)
    norm.weight.data = 1 + 0.3 * normal(32, seed=3, dtype=BF16)
    x = normal(50, 4, 32, seed=4, dtype=BF16)
    assert (reference.rms_norm(x, norm.weight, 1e-6) != norm(x)).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_codes_are_those_of_the_simulation(dtype):
    args = store_args((4, 4, 2, 9, 32), "int8" if dtype == torch.int8 else "fp8")
    plain16 = store_args((4, 4, 2, 9, 32), None)
    q = Z.store_kv(*args)
    assert torch.equal(q, Z.store_kv(*plain16))
    for codes, scale, wide in ((args[1], args[3], plain16[1]), (args[2], args[4], plain16[2])):
        for row, at in enumerate(args[5].tolist()):
            wanted, steps = reference.quantize(wide[row, :, at], dtype)
            assert torch.equal(codes[row, :, at].float(), wanted.float())
            assert torch.equal(scale[row, :, at], steps)


def test_bloom_with_padding_on_the_left():
    """What its own attention gets: positions count from the first that is seen, and the bias is rounded."""
    model = build_tiny("bloom", BF16)
    attention = model.transformer.h[0].self_attention
    length, padding = 40, (0, 9)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, : padding[1]] = 0
    hidden = normal(2, length, 64, dtype=BF16)
    alibi = model.transformer.build_alibi_tensor(mask, 4, BF16)
    blocked = torch.zeros(2, 1, length, length, dtype=BF16).masked_fill(mask[:, None, None] == 0, -1e30)
    seen = {}
    attention.dense.register_forward_pre_hook(lambda module, args: seen.update(context=args[0]))
    attention(hidden, torch.zeros_like(hidden), alibi, blocked)
    q, k, v = attention.query_key_value(hidden).view(2, length, 4, 3, 16).unbind(3)
    slopes = build_alibi_tensor(torch.ones(1, 2), 4, torch.float32)[:, 0, 1].contiguous()
    first, last = torch.tensor(padding, dtype=torch.int32), torch.tensor([length - 1] * 2, dtype=torch.int32)
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    found = Z.decode_attention(q[:, -1].contiguous(), k, v, None, None, first, last, 0.25, slopes)
    theirs = seen["context"][:, -1].view(2, 4, 16)
    assert torch.allclose(found.float(), theirs.float(), atol=2**-6 * theirs.abs().max().item())
    wrong = Z.decode_attention(q[:, -1].contiguous(), k, v, None, None, first, last, 0.25, 2 * slopes)
    assert not torch.allclose(wrong.float(), theirs.float(), atol=2**-6 * theirs.abs().max().item())


Q = torch.zeros(2, 4, 32, dtype=BF16)
K = torch.zeros(2, 2, 5, 32, dtype=BF16)
K8, S = K.to(torch.int8), torch.ones(2, 2, 5)
NULL = torch.zeros(2, dtype=torch.int32)
QKV, COS = torch.zeros(2, 8 * 32, dtype=BF16), torch.zeros(2, 32, dtype=BF16)
ATTEND, STORE, TOKEN = "decode_attention", "store_kv", "attend_token"
TEXT, CODES = "attend_text", "attend_text_codes"
T, U = torch.zeros(2, 7, 4, 32, dtype=BF16), torch.zeros(2, 7, 2, 32, dtype=BF16)
REST_OF_TEXT = (None, None, None, True, 0.2)
WIDE = torch.zeros(2, 7, 4, 144, dtype=BF16)
REST = (COS, COS, 4, 2, "half", None, None, 1e-6, 0.2, None)
MISUSES = [
    (
        TEXT,
        (T.float(), U, U, None, None, None, True, 0.2),
        "zq::attend_text: q is float32; allowed: bfloat16",
    ),
    (TEXT, (T, U.half(), U, None, None, None, True, 0.2), "k is float16 on cpu and q is bfloat16 on cpu"),
    (
        TEXT,
        (T, U[:, :6], U, None, None, None, True, 0.2),
        r"k has shape \[2, 6, 2, 32\] and q \[2, 7, 4, 32\]",
    ),
    (
        TEXT,
        (T, U, U[:, :, :1], None, None, None, True, 0.2),
        r"k has shape .* and v \[2, 7, 1, 32\]; they must",
    ),
    (
        TEXT,
        (T[..., ::2], U[..., ::2], U[..., ::2], None, None, None, True, 0.2),
        "q has strides .* must be 1",
    ),
    (TEXT, (T[:, :, :3], U, U, None, None, None, True, 0.2), "3 query heads cannot share 2 key-value heads"),
    (TEXT, (WIDE, WIDE, WIDE, None, None, None, True, 0.2), "heads have 144 channels; allowed: .* up to 128"),
    (TEXT, (T, U, U, U[:, :, 0, 0].int(), None, None, True, 0.2), "mask is int32; allowed: bfloat16"),
    (TEXT, (T, U, U, U[:, :6, 0, 0], None, None, True, 0.2), r"mask has shape \[2, 6\], expected \[2, 7\]"),
    (TEXT, (T, U, U, None, K, None, True, 0.2), "v_to is missing; give both or neither"),
    (TEXT, (T, U, U, None, K, K, True, 0.2), r"k_to is bfloat16 of shape \[2, 2, 5, 32\], .* with L >= 7"),
    (TEXT, (T, U, U, None, None, None, True, 0.0), "scale is 0.0; it must be more than 0"),
    (
        TEXT,
        (*[x[:1].expand(70000, -1, -1, -1) for x in (T, U, U)], *REST_OF_TEXT),
        "q has 70000 rows; allowed: up to 65535",
    ),
    (CODES, (T, U, U, None, None, None, True, 0.2, BF16), "dtype is bfloat16; allowed: int8, float8"),
    (
        CODES,
        (*[x.repeat(1, 1, 5, 1) for x in (T, U, U)], None, None, None, True, 0.2, FP8),
        "q has 20 heads; allowed: up to 16; use attend_text and quantize its rows",
    ),
    (TOKEN, (QKV, K, K, None, None, NULL, NULL, *REST, BF16), "dtype is bfloat16; allowed: int8, float8"),
    (TOKEN, (QKV, K, K, None, None, NULL, NULL.long(), *REST, torch.int8), "last is int64; allowed: int32"),
    (
        TOKEN,
        (QKV, K, K, None, None, NULL[:1], NULL, *REST, torch.int8),
        r"first has shape \[1\], expected \[2\]",
    ),
    (TOKEN, (QKV, K8, K8, None, S, NULL, NULL, *REST, torch.int8), "zq::attend_token: k_scale is missing"),
    (
        ATTEND,
        (Q[0], K, K, None, None, NULL, NULL, 1.0, None),
        r"q has shape \[4, 32\] and k \[2, 2, 5, 32\], expected",
    ),
    (
        ATTEND,
        (Q.float(), K, K, None, None, NULL, NULL, 1.0, None),
        "q is float32; allowed: bfloat16, float16",
    ),
    (
        ATTEND,
        (Q[:, :3].contiguous(), K, K, None, None, NULL, NULL, 1.0, None),
        "3 query heads cannot share 2",
    ),
    (ATTEND, (Q, K.half(), K, None, None, NULL, NULL, 1.0, None), "k is float16; allowed: bfloat16, int8"),
    (ATTEND, (Q, K8, K, S, S, NULL, NULL, 1.0, None), "k is int8 and v is bfloat16; give both in one type"),
    (ATTEND, (Q, K8, K8, S, None, NULL, NULL, 1.0, None), "v_scale is missing"),
    (ATTEND, (Q, K, K, S, None, NULL, NULL, 1.0, None), "k_scale is given, but k and v are no codes"),
    (
        ATTEND,
        (Q, K8, K8, S[:1], S, NULL, NULL, 1.0, None),
        r"k_scale is float32 of shape \[1, 2, 5\], expected float32 \[2,",
    ),
    (
        ATTEND,
        (Q, K, K[:, :, :4], None, None, NULL, NULL, 1.0, None),
        r"v has shape \[2, 2, 4, 32\], expected",
    ),
    (ATTEND, (Q, K.transpose(2, 3), K, None, None, NULL, NULL, 1.0, None), r"k has shape \[2, 2, 32, 5\]"),
    (ATTEND, (Q, K, K, None, None, NULL.long(), NULL, 1.0, None), "first is int64; allowed: int32"),
    (ATTEND, (Q, K, K, None, None, NULL, NULL[:1], 1.0, None), r"last has shape \[1\], expected \[2\]"),
    (ATTEND, (Q, K, K, None, None, NULL, NULL, 1.0, S[0, 0]), r"slopes has shape \[5\], expected \[4\]"),
    (ATTEND, (Q, K.to("meta"), K, None, None, NULL, NULL, 1.0, None), "k is on meta, the input on cpu"),
    (
        ATTEND,
        (Q[..., :20].contiguous(), K[..., :20], K[..., :20], None, None, NULL, NULL, 1.0, None),
        "heads have 20 channels",
    ),
    (STORE, (QKV[0], K, K, None, None, NULL, COS, COS, 4, 2, "half"), r"qkv has shape \[256\] and k"),
    (
        STORE,
        (QKV, K, K, None, None, NULL, COS, COS, 4, 2, "llama"),
        "rope is llama; allowed: none, half, interleaved",
    ),
    (STORE, (QKV, K, K, None, None, NULL, COS, COS, 4, 2, "none"), "rope is none; give cos and sin"),
    (STORE, (QKV, K, K, None, None, NULL, COS, None, 4, 2, "half"), "give cos and sin both"),
    (
        STORE,
        (QKV, K, K, None, None, NULL, COS[:, :7], COS[:, :7], 4, 2, "half"),
        "cos rotates 7 of 32 channels",
    ),
    (
        STORE,
        (QKV, K, K, None, None, NULL, COS.float(), COS, 4, 2, "half"),
        "cos is float32; allowed: bfloat16",
    ),
    (STORE, (QKV, K, K, None, None, NULL, COS, COS, 5, 2, "half"), "5 query heads cannot share 2"),
    (
        STORE,
        (QKV, K, K, None, None, NULL, COS, COS, 4, 2, "half", None, None, 1e-6, 3),
        "2 rows are no multiple of tokens, which is 3",
    ),
    (
        STORE,
        (QKV, K, K, None, None, NULL, COS, COS, 4, 2, "half", None, None, 1e-6, 2),
        r"k has shape \[2, 2, 5, 32\], expected \[1, 2, 5, 32\]",
    ),
    (
        STORE,
        (QKV, K, K, None, None, NULL, COS, COS, 6, 2, "half"),
        r"qkv has shape \[2, 256\], expected \[2, 320\]",
    ),
    (
        STORE,
        (QKV, K8, K8, S, S, NULL.short(), COS, COS, 4, 2, "half"),
        "position is int16; allowed: int32, int64",
    ),
    (
        STORE,
        (QKV, K, K, None, None, NULL, COS, COS, 4, 2, "half", COS),
        r"q_norm has shape \[2, 32\], expected \[32\]",
    ),
]


@pytest.mark.parametrize(
    ("name", "args", "message"), MISUSES, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(MISUSES)]
)
def test_misuse(name, args, message):
    with pytest.raises(ZqError, match=message) as raised:
        getattr(Z, name)(*args)
    assert str(raised.value).count("\n") == 0


def test_a_cache_whose_rows_are_not_aligned_is_refused():
    k = torch.zeros(2, 2, 5, 36, dtype=BF16)[..., :32]
    with pytest.raises(ZqError, match=r"k has strides \[360, 180, 36, 1\]; the last must be 1"):
        Z.decode_attention(Q, k, k, None, None, NULL, NULL, 1.0, None)


def test_no_rows():
    none = (x[:0] for x in (Q, K8, K8, S, S, NULL, NULL))
    assert Z.decode_attention(*none, 1.0, None).shape == (0, 4, 32)
    none = (x[:0] for x in (QKV, K8, K8, S, S, NULL, COS, COS))
    assert Z.store_kv(*none, 4, 2, "half").shape == (0, 4, 32)
    none = [x[:0] for x in (T, U, U)]
    assert Z.attend_text(*none, None, None, None, True, 1.0).shape == (0, 128)
    none = (x[:0] for x in (QKV, K8, K8, S, S, NULL, NULL, COS, COS))
    assert Z.attend_token(*none, *REST[2:], FP8)[0].shape == (0, 128)


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_a_token_is_its_parts(kv):
    args = token_args((3, 6, 2, 30, 32), kv, norms=True)
    other = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
    found, wanted = Z.attend_token(*args), in_parts(other, Z.store_kv, Z.decode_attention)
    for a, b in zip((*found, *args[1:5]), (*wanted, *other[1:5]), strict=True):
        assert a is b is None or torch.equal(a.float().nan_to_num(3), b.float().nan_to_num(3))


def test_units_of_a_model():
    names = {unit.name for unit in KV_UNITS}
    assert kv_units("bf16", "int8") == ("attention_int8_bf16", "store_kv_int8_bf16", "token_int8_bf16")
    assert {
        name for kind in ("bf16", "fp16") for kv in (None, "int8", "fp8") for name in kv_units(kind, kv)
    } | {text_unit(kind, out) for kind in ("bf16", "fp16") for out in TEXT_OUT} == names
