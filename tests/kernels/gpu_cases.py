"""Random products for gpu_smoke.py, and whether an answer is right."""

from __future__ import annotations

import torch
from torch import Tensor

from zq.kernels import layout

DEVICE = "cuda"
SHAPES = [
    (1, 128, 128),
    (3, 256, 512),
    (17, 200, 1040),
    (64, 1024, 2048),
    (130, 387, 1168),
    (300, 1536, 4096),
]
LARGE = (513, 4096, 1040)


class Random:
    """Random tensors on the device, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator(device=DEVICE).manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=DEVICE)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=DEVICE) + 0.5

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=DEVICE)


def make_weight(op: str, p: layout.Packing, n: int, k: int, some: Random) -> tuple[Tensor, Tensor]:
    """(packed, what it stands for [N, K] float64, without scales of channels)"""
    codes = some.integers(0, 16 if p.bits == 4 else 256, n, k).to(torch.uint8)
    if p.bits == 8 and "fp8" in op:
        codes = some.normal(n, k).to(torch.float8_e4m3fn).view(torch.uint8)
    groups = -(-k // p.group) if p.group else 0
    scale = offset = None
    if p.kind == "fp8_block":
        scale = some.uniform(-(-n // 128), -(-k // 128))
    elif p.kind == "w4a8_two":
        scale = some.integers(1, 17, n, groups).to(torch.uint8)
        offset = (some.integers(0, 256, n, groups) * (255 - 15 * scale.long()) // 255).to(torch.uint8)
    elif p.group:
        scale = some.uniform(n, groups).to(p.float16 if p.kind == "w4a16" else torch.float32)
        offset = some.integers(0, 16, n, groups).to(torch.uint8) if p.asym else None
    packed = layout.pack(p, codes, scale, offset)

    def spread(x: Tensor) -> Tensor:
        return x.double().repeat_interleave(p.group, 1)[:, :k]

    if p.bits == 8:
        weight = codes.view(torch.float8_e4m3fn if "fp8" in op else torch.int8).double()
        if scale is not None:
            weight *= scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    elif p.kind == "w4a8_two":
        weight = codes.double() * spread(scale) + spread(offset) - 128
    else:
        weight = codes.double() - (8 if offset is None else spread(offset))
        weight = weight if scale is None else weight * spread(scale)
    return packed, weight.to(p.float16).double() if p.act_bytes == 2 else weight


def make(op: str, p: layout.Packing, m: int, n: int, k: int, out: torch.dtype, bias: bool, seed: int) -> dict:
    """Random operands, the float64 product `exact`, and `terms`, the sum of the magnitudes of its terms."""
    some = Random(seed)
    packed, weight = make_weight(op, p, n, k, some)
    case: dict = {"y": None, "w": packed, "out": out}
    if p.act_bytes == 2:
        x = some.normal(m, k).to(p.float16)
    elif "fp8" in op:
        x = (some.normal(m, k) * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        x = some.integers(-128, 128, m, k).to(torch.int8)
    raw = torch.int16 if p.act_bytes == 2 else torch.uint8
    around = torch.full((m + 300, k), 127, dtype=raw, device=DEVICE)  # whatever reads beyond x shows
    around[:m] = x.view(raw)
    case["x"], value = around.view(x.dtype)[:m], x.double()
    if op == "fp8_block128":
        case["sx"] = some.uniform(m, -(-k // 128)) / 100
        value = value * case["sx"].double().repeat_interleave(128, 1)[:, :k]
    elif p.act_bytes == 1:
        case["sx"] = some.uniform(m) / 10000
    if op == "w4a8_int8":
        case["rowsum"] = x.sum(-1, dtype=torch.int32)
    if op == "w4a8_int8" or (p.group == 0 and p.kind != "fp8_block"):
        case["ws"] = some.uniform(n)
    if bias:
        case["bias"] = some.normal(n).to(out)
    case["exact"], case["terms"] = value @ weight.T, value.abs() @ weight.abs().T
    return case


def factor(case: dict) -> Tensor:
    """What sums are multiplied by: scales of channels, of tokens, or of both, as one float32."""
    sx, ws = case.get("sx"), case.get("ws")
    tokens = None if sx is None or sx.shape[1:] else sx[:, None]
    if ws is None:
        return torch.ones((), device=DEVICE) if tokens is None else tokens
    return ws if tokens is None else ws * tokens


def verdict(op: str, case: dict, y: Tensor) -> str:
    """ "" when y is right: bit for bit where sums are integers, else within the error of float32 sums."""
    by = factor(case)
    bias = case["bias"].float() if "bias" in case else torch.zeros((), device=DEVICE)
    right = (case["exact"].float() * by + bias).to(case["out"])
    if op in ("w8a8_int8", "w4a8_int8"):
        wrong = (y != right) | y.isnan()
    else:
        tolerance = 2e-3 if "fp8" in op else 1e-4 if op.endswith("a16") else 1e-5
        unit = 2.0**-8 if case["out"] == torch.bfloat16 else 2.0**-10
        exact = case["exact"] * by + bias
        allowed = unit * exact.abs() + tolerance * case["terms"] * by + 1e-30
        wrong = ~((y.double() - exact).abs() <= allowed)
    if not bool(wrong.any()):
        return ""
    at = wrong.nonzero()
    m, n = at[0].tolist()
    where = f"tokens {sorted(set(at[:, 0].tolist()))[:6]} rows {sorted(set(at[:, 1].tolist()))[:9]}"
    first = f"first [{m},{n}] {y[m, n].item()} not {right[m, n].item()}"
    return f"{len(at)} of {wrong.numel()} wrong, {first}; {where}"
