"""What is launched, as far as it shows without a GPU."""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor

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
@pytest.mark.parametrize("rows", [1, 64, 5000])
@pytest.mark.parametrize(
    "pieces", [1, 2, 31, 32, 33, 127, 128, 129, 512, 1000, 1024, 1025, 1793, 3583, 3584, 3585, 7000]
)
def test_every_piece_has_a_thread(pieces, rows, device):
    shape = launch.row_shape(pieces, rows, device)
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
    assert launch.row_shape(1792, 4096, DEVICE).entry == "quantize_4"
    assert launch.row_shape(96, 8192, DEVICE).entry == "quantize_warp"


STRUCTURES = {
    "before.cuh": launch.QuantArguments,
    "attention.cu": launch_kv.AttentionArguments,
    "store_kv.cu": launch_kv.StoreArguments,
}
TYPES = {"u64": ctypes.c_uint64, "int": ctypes.c_int, "float": ctypes.c_float}


@pytest.mark.parametrize("source", STRUCTURES)
def test_the_arguments_are_those_of_the_kernel(source):
    """Names in the same order, of the same types, and so, with natural alignment, at the same offsets."""
    structure = STRUCTURES[source]
    text = nvrtc.texts(source)[source]
    body = re.search(r"struct Args \{(.*?)\};", text, re.DOTALL)
    assert body
    declared = re.findall(r"^\s*([\w ]+?)\s*(\*?)(\w+);", body[1], re.MULTILINE)
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

    def record(device, unit, entry, grid, block, arguments, **options):
        assert entry in UNITS[unit].entries
        assert grid == (3, 1, 1)
        defines = dict(UNITS[unit].defines)
        assert defines["IN"] == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        assert defines["OUT"] == ("Int8" if UNITS[unit].name.split("_")[1] == "int8" else "E4m3")
        seen.append(UNITS[unit].ops[0])

    monkeypatch.setattr(launch.cuda, "launch", record)
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
        made = [x.new_empty(shape, dtype=kind) for shape, kind in getattr(checks, op)(*args)]
        launch.LAUNCH[op](op, made, *args)
    assert seen == list(calls)


def test_fp8_on_a_device_without_it(monkeypatch):
    monkeypatch.setattr(launch.cuda, "describe", lambda index: OLD)
    x = torch.zeros(1, 16)
    made = [x.new_empty(shape, dtype=kind) for shape, kind in checks.quant_fp8(x)]
    with pytest.raises(ZqError, match="sm_80 has no FP8; use INT8"):
        launch.LAUNCH["quant_fp8"]("quant_fp8", made, x)


def test_an_unaligned_tensor_is_refused():
    x = torch.zeros(65)
    launch.pointer(x)
    with pytest.raises(ZqError, match="16 bytes"):
        launch.pointer(x[1:])
    assert launch.pointer(None).value in (0, None)


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
    monkeypatch.setattr(launch.cuda, "workspace", lambda device, size, zeroed: None)
    monkeypatch.setattr(launch.cuda, "tensor_map", lambda *args: ("map", *args))
    monkeypatch.setattr(launch, "pointer", lambda x: x)
    seen = set()

    def record(device, unit, entry, grid, block, arguments, **options):
        assert entry in UNITS[unit].entries
        assert arch in UNITS[unit].archs
        assert options["shared"] <= device.shared
        seen.add(UNITS[unit].ops[0])
        if isinstance(arguments[0], tuple):
            assert arguments[0][:6] == ("map", args[0].data_ptr(), 3, 160, 160, args[0].element_size())
            arguments = arguments[1:]
        tensors, numbers = arguments[:8], [each.value for each in arguments[8:]]
        assert tensors[0] is args[0]
        assert tensors[3].dtype == torch.uint8
        assert tensors[6] is y
        for place, kind in ((1, torch.float32), (2, torch.int32), (4, torch.float32), (5, dtype)):
            assert tensors[place] is None or tensors[place].dtype == kind
        assert (tensors[1] is None) == (args[0].element_size() == 2)
        assert (tensors[5] is None) == (args.count(None) >= 1 + (name in WITHOUT_WS and tensors[4] is None))
        assert numbers[:4] == [3, 40, 160, 160]
        assert numbers[5] == int(dtype == torch.float16)

    monkeypatch.setattr(launch.cuda, "launch", record)
    for name, args in gemm_calls(3, 40, 160, dtype):
        if number < 89 and "fp8" in name:
            continue
        (shape, out), *_ = getattr(checks, name)(*args)
        y = args[0].new_empty(shape, dtype=out)
        launch.LAUNCH[name](name, [y], *args)
    assert seen == {name for name in ops.GEMM_OPS if number >= 89 or "fp8" not in name}


WITHOUT_WS = ("w4a16", "w4a8_int8_group")  # ws is None where there are groups
