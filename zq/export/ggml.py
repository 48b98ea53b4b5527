"""Blocks of llama.cpp's number formats that hold zq's codes and scales exactly.

    type   values per block, bytes   w =                                holds
    Q4_0   32, 18                    d (u - 8)                          int4, symmetric
    Q4_1   32, 20                    d u + m                            int4, asymmetric; m = -zero d in fp16
    Q8_0   32, 34                    d q                                int8, symmetric
    Q4_K   256, 144                  d sc[8] u - dmin m[8]              int4 two-level, sub > 0: sc = m = sub,
                                                                        dmin = 8 d
    Q6_K   256, 210                  d sc[16] (u - 32)                  int6, symmetric; two-level: sc = sub

u: unsigned codes; d, m, dmin: fp16. A scale of more values than a block is repeated. Layouts: ggml's
ggml-common.h and the reference decoder of the `gguf` package, against which every block is tested.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.numerics.groups import grouped_scale
from zq.numerics.qtensor import QTensor
from zq.spec import Scheme, TensorSpec

SUPER = 256  # values in a block of the K types


def adapt(scheme: Scheme) -> Scheme:
    """Scales as fp16, which all blocks have; beside zero points such that Q4_1's minimums are in fp16 too."""
    scale = "fp16" if scheme.weights.symmetric else "short"
    return replace(scheme, weights=replace(scheme.weights, scale_dtype=scale))


def refuse(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why no block holds this layer, whatever its values are, or None."""
    w, k = scheme.weights, shape[1]
    unit = 16 if w.bits == 6 else 32
    problems = [
        (scheme.activations is not None, "GGUF files say nothing of activations"),
        (
            w.format not in ("int4", "int6", "int8"),
            f"llama.cpp has no {w.format} blocks, only int4, int6 and int8",
        ),
        (w.extras, "llama.cpp's blocks have codes and scales only"),
        (not w.symmetric and w.bits != 4, f"llama.cpp's blocks of {w.format} are symmetric"),
        (
            w.layout.kind in ("block", "rank1", "tile"),
            "scales of llama.cpp's blocks run along the inputs of a row",
        ),
        (
            w.layout.kind == "group" and bool((w.layout.size or 0) % unit),
            f"groups of {w.layout.size} are no multiple of the {unit} values of a block",
        ),
        (
            w.layout.kind == "group" and bool(k % (w.layout.size or 1)),
            f"groups of {w.layout.size} do not divide K={k}",
        ),
        (w.two_level and w.bits == 8, "llama.cpp has no two-level int8"),
        (bool(k % 32), f"K={k} is no multiple of 32"),
        (w.bits == 6 and bool(k % SUPER), f"K={k} is no multiple of {SUPER}, as Q6_K needs"),
        (
            w.bits == 6
            and not w.two_level
            and w.layout.kind == "group"
            and bool((w.layout.size or 0) % SUPER),
            f"Q6_K has one free scale in {SUPER} values; use int6:channel or two-level",
        ),
    ]
    return next((reason for hit, reason in problems if hit), None)


def encode(q: QTensor) -> tuple[str, Tensor]:
    """(type, blocks uint8 [N, bytes per row]) with exactly the values of q. Raises ZqError when there is no
    such block because a scale is not in fp16, or a minimum, or two levels have a negative one."""
    spec = q.spec
    if spec.bits == 8:
        return "Q8_0", _q8_0(q.codes, _steps(q, 32))
    if spec.bits == 6:
        return "Q6_K", _q6_k(q)
    if spec.two_level and q.shape[1] % SUPER == 0 and q.sub is not None and int(q.sub.min()) > 0:
        return "Q4_K", _q4_k(q)
    steps = _steps(q, 32)
    if q.zero is None:
        return "Q4_0", _nibbles(q.codes, steps)
    zero = _repeat(grouped_scale(q.zero, spec), q.shape[1], spec, 32).float() + 8
    return "Q4_1", _nibbles(q.codes, steps, _half(-zero * steps, "its zero points times its scales"))


def _steps(q: QTensor, unit: int) -> Tensor:
    """The scale of every `unit` values, [N, K/unit] fp16."""
    step = grouped_scale(q.scale, q.spec).float()
    step = step if q.sub is None else step * q.sub
    return _half(_repeat(step, q.shape[1], q.spec, unit).expand(q.shape[0], -1), "its scales")


def _repeat(values: Tensor, k: int, spec: TensorSpec, unit: int) -> Tensor:
    size = spec.layout.size if spec.layout.kind == "group" else k
    return values.repeat_interleave((size or k) // unit, 1)


def _half(values: Tensor, what: str) -> Tensor:
    stored = values.half()
    if not torch.equal(stored.float(), values.float()):
        raise ZqError(f"{what} are not in fp16, which llama.cpp's blocks store")
    return stored


def _bytes(values: Tensor) -> Tensor:
    """[N, B] -> uint8 [N, B, bytes]."""
    return values.contiguous().view(torch.uint8).reshape(*values.shape, values.element_size())


def _nibbles(codes: Tensor, d: Tensor, m: Tensor | None = None) -> Tensor:
    """Q4_0, or Q4_1 with m: values 0 to 15 of a block are the low nibbles, 16 to 31 the high ones."""
    n, k = codes.shape
    u = (codes + 8).view(torch.uint8).reshape(n, k // 32, 2, 16)
    packed = u[:, :, 0] | u[:, :, 1] << 4
    head = [_bytes(d)] if m is None else [_bytes(d), _bytes(m)]
    return torch.cat([*head, packed], -1).reshape(n, -1)


def _q8_0(codes: Tensor, d: Tensor) -> Tensor:
    n, k = codes.shape
    return torch.cat([_bytes(d), codes.contiguous().view(torch.uint8).reshape(n, k // 32, 32)], -1).reshape(
        n, -1
    )


def _q4_k(q: QTensor) -> Tensor:
    n, k = q.shape
    supers = k // SUPER
    d = _half(q.scale.float().expand(n, supers), "its scales")
    least = _half(8 * d.float(), "its minimums")
    assert q.sub is not None
    sub = _repeat(q.sub.to(torch.uint8), k, q.spec, 32).reshape(n, supers, 8)
    low, high = sub[:, :, :4], sub[:, :, 4:]
    first = low | high >> 4 << 6  # sc; m = sc, so the same bytes again
    scales = torch.cat([first, first, (high & 15) | (high & 15) << 4], -1)
    u = (q.codes + 8).view(torch.uint8).reshape(n, supers, 4, 2, 32)
    packed = (u[:, :, :, 0] | u[:, :, :, 1] << 4).reshape(n, supers, 128)
    return torch.cat([_bytes(d), _bytes(least), scales, packed], -1).reshape(n, -1)


def _q6_k(q: QTensor) -> Tensor:
    n, k = q.shape
    supers = k // SUPER
    if q.sub is not None:
        d = _half(q.scale.float().expand(n, supers), "its scales")
        scales = _repeat(q.sub.to(torch.int8), k, q.spec, 16)
    else:
        d = _steps(q, SUPER)
        scales = torch.ones(n, k // 16, dtype=torch.int8)
    u = (q.codes + 32).view(torch.uint8).reshape(n, supers, 2, 4, 32)
    a, b, c, e = u.unbind(3)
    low = torch.cat([a & 15 | (c & 15) << 4, b & 15 | (e & 15) << 4], -1).reshape(n, supers, 128)
    high = (a >> 4 | b >> 4 << 2 | c >> 4 << 4 | e >> 4 << 6).reshape(n, supers, 64)
    signed = scales.contiguous().view(torch.uint8).reshape(n, supers, 16)
    return torch.cat([low, high, signed, _bytes(d)], -1).reshape(n, -1)
