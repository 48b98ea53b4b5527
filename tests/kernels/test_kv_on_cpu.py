"""attention.cu and store_kv.cu themselves, compiled for the CPU (tests/kernels/host), against the
references."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch import Tensor

from tests.kernels.inputs import BF16, FP16
from tests.kernels.inputs_kv import attention_args, in_parts, store_args, token_args
from tests.kernels.near_kv import of_magnitudes, worst
from tests.kernels.on_cpu import Sources, aligned, into
from zq.kernels import checks_kv, launch_kv, reference_kv
from zq.kernels.table import UNITS
from zq.kernels.table_kv import HEADS

ATTEND = """
extern "C" void run(const Args *a, int entry, int x, int y, int z, int backwards) {
  run_grid({x, y, z}, 128, [=] { entry == 64 ? attention_64(*a) : entry == 96 ? attention_96(*a) : entry ==
  128 ? attention_128(*a) : attention_256(*a); }, backwards);
}
"""
STORE = """
extern "C" void run(const Args *a, int entry, int x, int y, int z, int backwards) {
  run_grid({x, y, z}, 128, [=] { entry == 64 ? store_kv_64(*a) : entry == 128 ? store_kv_128(*a) :
  store_kv_256(*a); }, backwards);
}
"""
ROWS = """
extern "C" void run(const Args *a, int entry, int x, int y, int z, int backwards) {
  run_grid({x, y, z}, 128, [=] { entry == 64 ? store_rows_64(*a) : store_rows_128(*a); }, backwards);
}
"""
TOKEN = ATTEND.replace("attention_", "token_")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("host"))


@pytest.fixture
def device(sources, monkeypatch):
    """Operators launch on the CPU; `device.arch`, `.sms`, `.backwards` may be set, `.grids` is what was
    launched in `.entries`, `.scratch` the workspaces and how much of each is counters."""

    class Device:
        arch, sms, backwards = 90, 132, False

        def __init__(self) -> None:
            self.grids: list[tuple[int, int, int]] = []
            self.entries: list[str] = []
            self.scratch: list[tuple[Tensor, int]] = []

    it = Device()

    def describe(index):
        return launch_kv.cuda.Device(0, f"sm_{it.arch}", it.arch, it.sms, 232448, None)

    def launch(call):
        assert call.block == 128
        it.grids.append(call.grid)
        if call.scratch is not None:
            made = aligned(torch.full((call.scratch.size,), 0xFF, dtype=torch.uint8))
            made[: call.scratch.zeroed] = 0
            it.scratch.append((made, call.scratch.zeroed))
            call.lend(made)
        it.entries.append(call.entry)
        what, _, name = call.entry.rpartition("_")
        run = {"attention": ATTEND, "token": TOKEN, "store_kv": STORE, "store_rows": ROWS}[what]
        library = sources.compile(UNITS[call.unit], run, {}, it.arch, "-O1")
        library.run(ctypes.byref(call.arguments), int(name), *call.grid, it.backwards)

    monkeypatch.setattr(launch_kv.cuda, "describe", describe)
    monkeypatch.setattr(launch_kv.Launch, "__call__", launch)
    return it


def launched(name: str, args: tuple) -> Tensor:
    """Into memory full of NaN; q is aligned as on a GPU."""
    return whole(name, args)[0]


def whole(name: str, args: tuple) -> list[Tensor]:
    args = (aligned(args[0]), *args[1:])
    made = [aligned(torch.zeros(shape, dtype=dtype)) for shape, dtype in getattr(checks_kv, name)(*args)]
    for out in made:
        out.view(torch.uint8).fill_(0xFF)
    into(name, args, made)
    return made


def attend(device, args: tuple) -> Tensor:
    found = launched("decode_attention", args)
    for memory, zeroed in device.scratch:
        assert not memory[:zeroed].any(), "counters are not zero again"
    return found


def near(found: Tensor, args: tuple) -> None:
    assert worst(found, args, sums=1e-6) <= 1


SHAPES = [
    (2, 4, 4, 37, 64),
    (1, 8, 2, 130, 128),
    (2, 6, 1, 65, 80),
    (1, 3, 3, 50, 96),
    (2, 2, 1, 33, 256),
    (1, 9, 1, 41, 16),
    (1, 20, 1, 17, 48),
    (1, 18, 2, 23, 32),
]


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_head_size_and_cache(shape, kv, device):
    args = attention_args(shape, kv)
    near(attend(device, args), args)


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_half_precision_and_alibi(kv, device):
    args = attention_args((2, 4, 2, 70, 64), kv, FP16, alibi=True)
    near(attend(device, args), args)
    args = attention_args((2, 4, 4, 300, 64), kv, BF16, spans=[(130, 299), (0, 200)], alibi=True)
    near(attend(device, args), args)


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sms", [1, 3, 132])
def test_chunks_of_several_blocks(kv, backwards, sms, device):
    """Rows of one chunk and of many, blocks that take several chunks, blocks without any, in either order."""
    device.sms, device.backwards = sms, backwards
    spans = [(0, 2099), (5, 5), (1300, 2000), (7, 1034), (2, 128)]
    args = attention_args((5, 2, 1, 2100, 16), kv, spans=spans)
    near(attend(device, args), args)


def test_more_chunks_than_a_warp_adds_at_once(device):
    args = attention_args((2, 1, 1, 9400, 16), None, spans=[(0, 9399), (100, 9000)])
    near(attend(device, args), args)
    assert device.grids == [(1, 2, 37)]


def test_the_bias_is_rounded_as_bloom_rounds_it(device):
    """Far from the first position, where bfloat16 has steps of 4."""
    args = list(attention_args((1, 2, 1, 1500, 16), None, spans=[(200, 1499)]))
    args[8] = torch.tensor([0.71, 0.5])
    near(attend(device, tuple(args)), tuple(args))


def test_a_row_does_not_depend_on_the_others(device):
    """Nor on where it lies in its cache; and a second run gives the same bits."""
    spans = [(0, 1399), (3, 9), (700, 1301), (0, 600)]
    args = attention_args((4, 4, 2, 1400, 64), "int8", spans=spans)
    whole = attend(device, args)
    assert torch.equal(whole, attend(device, args))
    assert device.grids[-1][2] > 1
    for row in range(4):
        alone = tuple(x[row : row + 1] if isinstance(x, Tensor) else x for x in args)
        assert torch.equal(attend(device, alone)[0], whole[row])
    begin, end = spans[2]
    moved = tuple(
        x[2:3, :, begin : end + 1] if isinstance(x, Tensor) and x.dim() >= 3 and i else x
        for i, x in enumerate(args)
    )
    moved = (args[0][2:3], *moved[1:5], torch.tensor([0], dtype=torch.int32))
    moved = (*moved, torch.tensor([end - begin], dtype=torch.int32), *args[7:])
    assert torch.equal(attend(device, moved)[0], whole[2])


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_extreme_values(kv, device):
    for size in (1e-30, 1e-3, 30.0, 1000.0):
        args = attention_args((2, 4, 2, 90, 64), kv, size=size)
        near(attend(device, args), args)
    args = list(attention_args((2, 4, 2, 90, 64), kv))
    args[0] = torch.zeros_like(args[0])  # all probabilities are equal
    near(attend(device, tuple(args)), tuple(args))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_subnormal_outputs_are_the_nearest(kv, seed, device):
    """Of what float64 gives, but for the rounding of probabilities: the likely position has the value zero,
    the others have chances down to 2^-30."""
    args = attention_args((20, 14, 2, 40, 64), kv, FP16, [(0, 39)] * 20, seed=seed, size=3.0)
    q, k, v, scale = args[:4]
    scores = q.double().view(20, 2, 7, 64) @ (k.double() * scale[..., None]).mT
    for row, head in itertools.product(range(20), range(2)):
        v[row, head, scores[row, head].argmax(-1)] = 0
    found = attend(device, args)
    near(found, args)
    exact, chance = (
        reference_kv.decode_attention(q.double(), *each[1:]) for each in (args, of_magnitudes(args))
    )
    rounding = (exact.abs() * 2.0**-11).clamp_min(2.0**-25)
    subnormal = (exact.abs() < 2.0**-14) & (exact.abs() > 2.0**-24)
    assert subnormal.sum() > 500
    assert ((found.double() - exact).abs() <= 1.01 * rounding + (2.0**-11 + 1e-5) * chance).all()


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_scales_that_differ_by_powers(kv, device):
    """A value of zeros has the scale 1, whatever those of the others are."""
    args = list(attention_args((1, 2, 1, 60, 64), kv))
    codes, scale = args[2], args[4]
    scale *= 1e-4
    codes[0, 0, 31], scale[0, 0, 31] = torch.zeros(64).to(codes.dtype), 1.0
    near(attend(device, tuple(args)), tuple(args))


def test_one_position_is_its_value(device):
    for kv in (None, "int8", "fp8"):
        args = attention_args((3, 4, 2, 20, 64), kv, spans=[(0, 0), (7, 7), (19, 19)])
        found = attend(device, args)
        for row, at in enumerate((0, 7, 19)):
            value = args[2][row, :, at].float()
            value = value if args[4] is None else value * args[4][row, :, at, None]
            near(found, args)
            assert torch.allclose(found[row].float(), value.repeat_interleave(2, 0), rtol=2**-8)


def test_nothing_is_seen(device):
    args = attention_args((2, 2, 1, 20, 16), None, spans=[(5, 4), (0, 19)])
    found = attend(device, args)
    assert (found[0] == 0).all()
    near(found, args)


def test_spans_beyond_the_cache_are_cut(device):
    args = list(attention_args((1, 2, 1, 20, 16), None, spans=[(0, 19)]))
    args[5], args[6] = torch.tensor([-4], dtype=torch.int32), torch.tensor([900], dtype=torch.int32)
    near(attend(device, tuple(args)), tuple(args))


@pytest.mark.parametrize("arch", [80, 90])
def test_every_e4m3_code_on_old_and_new_devices(arch, device):
    """One position, whose value is a row of codes; sm_80 converts by bits."""
    device.arch = arch
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)[:240].view(1, 1, 1, 240)
    scale = torch.ones(1, 1, 1)
    zero = torch.zeros(1, dtype=torch.int32)
    args = (torch.ones(1, 1, 240, dtype=BF16), codes, codes, scale, scale, zero, zero, 1.0, None)
    assert torch.equal(attend(device, args).float().view(-1), codes.float().view(-1))


STORES = [
    {"rope": "half"},
    {"rope": "half", "rotary": 24},
    {"rope": "interleaved", "rotary": 16},
    {"rope": "none"},
    {"rope": "half", "wide": False},
    {"rope": "half", "tokens": 3},
]


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
@pytest.mark.parametrize("options", STORES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_store(kv, options, dtype, device):
    for shape in ((5, 6, 2, 11, 32), (1, 4, 4, 3, 80), (2, 1, 1, 5, 256)):
        args = store_args(shape, kv, dtype, **options)
        other = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
        found, wanted = launched("store_kv", args), reference_kv.store_kv(*other)
        assert torch.equal(found, wanted)
        for a, b in zip(args[1:5], other[1:5], strict=True):
            assert a is b is None or torch.equal(a.float(), b.float())


ROPES = [{"rope": "none"}, {}, {"rotary": 8}, {"rotary": 12}, {"rope": "interleaved"}]
PROMPTS = [(2, 5, 5, 9, 64), (1, 7, 1, 8, 128), (3, 2, 2, 7, 96), (2, 33, 3, 6, 16)]


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("shape", PROMPTS, ids=str)
def test_several_heads_at_once(shape, rope, device):
    """Of prompts: heads that are no multiple of what a warp takes, and a few blocks for many tokens."""
    for device.sms in (132, 1):
        args = store_args(shape, None, BF16, tokens=5, **rope)
        other = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
        found, wanted = launched("store_kv", args), reference_kv.store_kv(*other)
        assert torch.equal(found, wanted)
        assert torch.equal(args[1], other[1])
        assert torch.equal(args[2], other[2])
    assert {entry.rpartition("_")[0] for entry in device.entries} == {"store_rows"}


@pytest.mark.parametrize("kv", [None, "int8"])
def test_store_with_norms(kv, device):
    """The sum of squares is taken in another order, which may move a number by one unit."""
    args = store_args((5, 6, 2, 11, 64), kv, BF16, norms=True)
    other = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
    found, wanted = launched("store_kv", args), reference_kv.store_kv(*other)
    apart = (found.double() - wanted.double()).abs()
    assert (
        apart <= 2**-7 * wanted.double().abs() + 2**-8 * (wanted.double().abs().amax(-1, keepdim=True))
    ).all()
    assert (apart > 0).double().mean() < 0.01
    for a, b in zip(args[1:3], other[1:3], strict=True):
        apart = (a.double() - b.double()).abs()
        assert (apart > 0).double().mean() < 0.01
        assert apart.max() <= (1 if kv else 2**-6 * b.double().abs().max())


def test_a_position_outside_is_not_written(device):
    args = list(store_args((3, 2, 1, 6, 32), "int8"))
    args[5] = torch.tensor([-1, 6, 2])
    kept = [x.clone() for x in args[1:5]]
    launched("store_kv", tuple(args))
    for now, before in zip(args[1:5], kept, strict=True):
        assert torch.equal(now[:2], before[:2])
        assert not torch.equal(now[2], before[2])
        assert torch.equal(now[2, :, [0, 1, 3, 4, 5]], before[2, :, [0, 1, 3, 4, 5]])


def test_e4m3_by_bits(device):
    """sm_80 has no instruction for it."""
    x = torch.cat([torch.linspace(-500, 500, 512), torch.logspace(-6, 2, 512), -torch.logspace(-4, -2, 512)])
    rows = x.to(BF16).view(-1, 256)
    qkv = torch.cat([rows, rows.flip(0), rows], 1).contiguous()
    made = []
    for device.arch in (80, 90):
        k, v = (torch.zeros(6, 1, 1, 256, dtype=torch.float8_e4m3fn) for _ in range(2))
        ks, vs = (torch.zeros(6, 1, 1) for _ in range(2))
        args = (qkv, k, v, ks, vs, torch.zeros(6, dtype=torch.int32), None, None, 1, 1, "none")
        launched("store_kv", args)
        made.append((k.float(), v.float(), ks, vs))
    for old, new in zip(*made, strict=True):
        assert torch.equal(old, new)


def same_as_its_parts(device, args: tuple) -> None:
    """To the bit: codes, scales, sums of rows, and the cache."""
    other = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
    found = whole("attend_token", args)
    for memory, zeroed in device.scratch:
        assert not memory[:zeroed].any(), "counters are not zero again"
    wanted = in_parts(other, lambda *a: launched("store_kv", a), lambda *a: launched("decode_attention", a))
    for a, b in zip((*found, *args[1:5]), (*wanted, *other[1:5]), strict=True):
        assert a is b is None or torch.equal(a.float().nan_to_num(3), b.float().nan_to_num(3))


TOKENS = [
    {},
    {"rope": "half", "rotary": 16, "to": torch.float8_e4m3fn},
    {"rope": "interleaved", "rotary": 8},
    {"rope": "none", "alibi": True},
    {"norms": True},
]


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
@pytest.mark.parametrize("options", TOKENS, ids=str)
def test_a_token_in_one_launch(kv, options, device):
    for shape in ((3, 6, 2, 300, 32), (2, 12, 1, 40, 80), (1, 2, 2, 20, 256)):
        same_as_its_parts(device, token_args(shape, kv, **options))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sms", [1, 132])
def test_a_token_of_several_blocks(backwards, sms, device):
    """Rows of one chunk and of many; the newest position alone, before the first that is seen, outside."""
    device.sms, device.backwards = sms, backwards
    spans = [(0, 2099), (5, 5), (1300, 2000), (7, 6), (2, 2100), (0, 128)]
    for kv, dtype in ((None, FP16), ("int8", BF16)):
        same_as_its_parts(device, token_args((6, 10, 1, 2100, 16), kv, dtype, spans=spans))


def test_a_long_row_of_heads_and_one_of_zeros(device):
    """More pieces than the threads of a block keep; the third row is zeros."""
    for to in (torch.int8, torch.float8_e4m3fn):
        same_as_its_parts(device, token_args((3, 72, 12, 9, 128), None, BF16, to, [(0, 0), (0, 4), (2, 2)]))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000, 1023, 1024, 1025, 4096, 32768, 131072])
@pytest.mark.parametrize("groups", [1, 8, 32])
def test_the_workspace_is_as_large_as_the_kernel_needs(length, groups):
    """The kernel's rule, for every head size and every number of positions up to `length`."""
    pieces, most, blocks = launch_kv.attention_grid(1, groups, length, 132)
    assert 1 <= blocks <= most
    for d, size in itertools.product(HEADS, (1, 2)):
        tile = 16 if d >= 256 else 64 if d * size <= 128 else 32
        for seen in {
            1,
            length,
            *(n for n in (128, 129, 512, 1023, 1024, 1500, length - 1) if 0 < n <= length),
        }:
            chunk = max(128 if seen < 1024 else 256, -(-seen // pieces))
            chunk = -(-chunk // (4 * tile)) * 4 * tile
            assert -(-seen // chunk) <= most
