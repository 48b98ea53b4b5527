"""What is launched, as far as it shows without a GPU."""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import pytest
import torch

from tests.kernels.inputs import gemm_calls
from zq.errors import ZqError
from zq.kernels import checks, checks_kv, launch_kv, nvrtc, ops
from zq.kernels.table import UNITS
from zq.kernels.table_optim import OPTIM_UNITS

launch = pytest.importorskip("zq.kernels.launch")


DEVICE = launch.cuda.Device(0, "sm_90a", 90, 132, 232448, None)
OLD = launch.cuda.Device(0, "sm_80", 80, 108, 166912, None)
EACH = {"quantize_warp": 4, "quantize_1": 1, "quantize_4": 4, "quantize_cluster": 1}  # pieces of a thread


@pytest.mark.parametrize("device", [DEVICE, OLD])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("rows", [1, 64, 5000])
@pytest.mark.parametrize(
    "pieces", [1, 2, 31, 32, 33, 127, 128, 129, 512, 1000, 1024, 1025, 1793, 3583, 3584, 3585, 7000]
)
def test_every_piece_has_a_thread(pieces, rows, bare, device):
    shape = launch.row_shape(pieces, rows, device, bare)
    assert shape.entry in UNITS["plain_int8_bf16"].entries
    assert shape.threads % 32 == 0
    assert shape.shared == (16 * pieces if shape.entry == "quantize_long" else 0)
    limit = {"quantize_warp": 256, "quantize_4": 896, "quantize_cluster": 512}.get(shape.entry, 1024)
    assert 32 <= shape.threads <= limit, "what the kernel is compiled for"
    if shape.entry == "quantize_long":
        return
    threads = shape.blocks * shape.threads // shape.rows
    assert threads * EACH[shape.entry] >= pieces
    assert shape.blocks in (1, 2, 4, 8)
    assert shape.blocks == 1 or device.number >= 90, "older ones have no clusters"


def test_few_rows_are_spread_and_many_are_not():
    assert launch.row_shape(512, 1, DEVICE).threads == 512
    assert launch.row_shape(1792, 1, DEVICE) == ("quantize_cluster", 448, 1, 4, 0)
    assert launch.row_shape(1792, 1, OLD).entry == "quantize_4"
    assert launch.row_shape(1792, 64, DEVICE).entry == "quantize_4"
    assert launch.row_shape(96, 128, DEVICE).entry == "quantize_1"
    assert launch.row_shape(96, 1024, DEVICE).entry == "quantize_warp"
    assert launch.row_shape(512, 1, DEVICE, bare=True) == ("quantize_4", 128, 1, 1, 0)
    assert launch.row_shape(1792, 1, DEVICE, bare=True).entry == "quantize_4"
    assert launch.row_shape(3584, 1, DEVICE, bare=True).entry == "quantize_cluster"


STRUCTURES = {
    "before.cuh": launch.QuantArguments,
    "attention.cu": launch_kv.AttentionArguments,
    "store_kv.cu": launch_kv.StoreArguments,
    "token.cu": launch_kv.TokenArguments,
}
TYPES = {"u64": ctypes.c_uint64, "int": ctypes.c_int, "float": ctypes.c_float}


@pytest.mark.parametrize("source", STRUCTURES)
def test_the_arguments_are_those_of_the_kernel(source):
    """Names in the same order, of the same types, and so, with natural alignment, at the same offsets."""
    structure = STRUCTURES[source]
    text = "\n".join(nvrtc.texts(source).values())

    def fields(name):
        body = re.search(rf"struct {name} (?:: (\w+) )?\{{(.*?)\n\}};", text, re.DOTALL)
        assert body
        own = re.findall(r"^\s*([\w ]+?)\s*(\*?)(\w+);", body[2], re.MULTILINE)
        return [*(fields(body[1]) if body[1] else ()), *own]

    declared = fields("Args")
    assert [name for _, _, name in declared] == [name for name, *_ in structure._fields_]
    for (kind, star, name), (_, type_) in zip(declared, structure._fields_, strict=True):
        assert type_ is (ctypes.c_void_p if star else TYPES[kind]), name
    sizes = sum(8 if star or kind == "u64" else 4 for kind, star, _ in declared)
    assert ctypes.sizeof(structure) == -(-sizes // 8) * 8


def test_every_operator_has_a_launch_and_every_unit_an_operator():
    assert set(launch.LAUNCH) == set(ops.SCHEMAS)
    steps = {op for unit in OPTIM_UNITS for op in unit.ops}
    assert {op for unit in UNITS.values() for op in unit.ops} - steps == set(ops.SCHEMAS)
    for op in ops.SCHEMAS:
        assert callable(getattr(checks_kv if op in ops.KV_OPS else checks, op))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [torch.int8, torch.float8_e4m3fn])
def test_names_lead_to_units(dtype, out, monkeypatch):
    """Every activation operator, with a device that is none: what would be launched exists."""
    seen = []
    monkeypatch.setattr(launch.cuda, "describe", lambda index: DEVICE)

    def record(it):
        assert it.entry in UNITS[it.unit].entries
        assert it.grid == ((1 if it.entry == "quantize_warp" else 3), 1, 1)
        defines = dict(UNITS[it.unit].defines)
        assert defines["IN"] == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        assert defines["OUT"] == ("Int8" if UNITS[it.unit].name.split("_")[1] == "int8" else "E4m3")
        seen.append(UNITS[it.unit].ops[0])

    x, weight = torch.randn(3, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    calls = {
        "quant_int8": (x,),
        "quant_fp8": (x,),
        "quant_fp8_block128": (x,),
        "rms_norm_quant": (x, weight, 1e-5, out),
        "add_rms_norm_quant": (x, x, weight, 1e-5, out),
        "layer_norm_quant": (x, weight, weight, 1e-5, out),
        "add_layer_norm_quant": (x, x, weight, weight, 1e-5, out),
        "post_layer_norm_quant": (x, x, weight, weight, 1e-5, out),
        "silu_mul_quant": (x, out),
        "gelu_quant": (x, "tanh", out),
    }
    assert set(calls) == set(ops.QUANT_OPS)
    for op, args in calls.items():
        kept = launch.prepare(op, args)
        record(kept.launch)
        tensors = [
            i for i, arg in enumerate((*args, *kept.outputs)) if isinstance(arg, (torch.Tensor, tuple))
        ]
        assert sorted(place for _, place, _ in kept.slots) == tensors
    assert seen == list(calls)


def test_fp8_on_a_device_without_it(monkeypatch):
    monkeypatch.setattr(launch.cuda, "describe", lambda index: OLD)
    x = torch.zeros(1, 16)
    with pytest.raises(ZqError, match="sm_80 has no FP8; use INT8"):
        launch.prepare("quant_fp8", (x,))


def test_an_unaligned_tensor_is_refused():
    x = torch.zeros(65)
    launch.cuda.pointer(x)
    with pytest.raises(ZqError, match="16 bytes"):
        launch.cuda.pointer(x[1:])
    assert launch.cuda.pointer(None).value in (0, None)


def test_tensor_maps_are_aligned():
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: launch.cuda.TensorMap(), range(64)))
    assert {each.getPtr() % 64 for each in made} == {0}
    for each in made:
        begin = ctypes.addressof(each._memory)
        assert begin <= each.getPtr() <= begin + 192 - 128


@pytest.mark.parametrize(("arch", "number"), [("sm_80", 80), ("sm_89", 89), ("sm_90a", 90), ("sm_120", 120)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_lead_to_units(arch, number, dtype, monkeypatch):
    """The kernel exists for the architecture, and gets its arguments in the order of the contract."""
    device = launch.cuda.Device(0, arch, number, 132, 232448, None)
    monkeypatch.setattr(launch.cuda, "describe", lambda index: device)
    seen = set()
    for name, args in gemm_calls(3, 40, 160, dtype):
        if number < 89 and "fp8" in name:
            continue
        kept = launch.prepare(name, args)
        it, unit = kept.launch, UNITS[kept.launch.unit]
        assert it.entry in unit.entries
        assert arch in unit.archs
        assert it.options[2] <= device.shared
        seen.add(unit.ops[0])
        numbers = [getattr(it.arguments, field) for field in ("m", "n", "k", "ldx", "half")]
        assert numbers == [3, 40, 160, 160, int(kept.outputs[0][1] == torch.float16)]
        assert len(it.params) == 14 + (it.mapped is not None)
        if it.mapped is not None:
            assert it.mapped.rows == 3
            assert (it.mapped.k, it.mapped.width) == (160, args[0].element_size())
        # Each tensor is where its name is.
        ((shape, out),) = kept.outputs
        tensors = (*args, args[0].new_empty(shape, dtype=out))
        launch.address(kept, tensors)
        wanted = dict(zip(signature(getattr(checks, name)).parameters, args, strict=False))
        for field in ("x", "sx", "rowsum", "w", "ws", "bias"):
            tensor = wanted.get(field)
            assert (getattr(it.arguments, field) or 0) == (0 if tensor is None else tensor.data_ptr())
        assert it.arguments.y == tensors[-1].data_ptr()
    assert seen == {name for name in ops.GEMM_OPS if number >= 89 or "fp8" not in name}


def test_a_call_is_prepared_once_for_each_thread(monkeypatch):
    """Shapes, dtypes, strides and numbers tell calls apart, addresses do not."""
    device = launch.cuda.Device(0, "sm_90a", 90, 132, 232448, None)
    monkeypatch.setattr(launch.cuda, "describe", lambda index: device)
    launched, prepared, prepare = [], [], launch.prepare
    monkeypatch.setattr(launch.Launch, "__call__", lambda it: launched.append(it.arguments.x))
    monkeypatch.setattr(launch, "prepare", lambda *args: prepared.append(args) or prepare(*args))
    rows = [torch.randn(3, 64), torch.randn(3, 64), torch.randn(5, 64), torch.randn(0, 64)]

    def calls() -> None:
        for x in rows:
            q, scale, rowsum = launch.run("quant_int8", (x,))
            assert (q.shape, scale.shape, rowsum.shape) == (x.shape, x.shape[:1], x.shape[:1])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(calls).result()
        assert len(prepared) == 3
        pool.submit(calls).result()
        assert len(prepared) == 3
    with ThreadPoolExecutor(1) as pool:
        pool.submit(calls).result()
    assert len(prepared) == 6
    assert launched == [x.data_ptr() for x in rows[:3]] * 3
    with pytest.raises(ZqError, match=r"expected \[M, K\]"):
        launch.run("quant_int8", (torch.zeros(3, 3),))
