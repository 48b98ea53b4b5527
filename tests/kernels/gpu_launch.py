"""Compile and launch the matrix kernels with the driver alone, for gpu_smoke.py: it should tell what is wrong
with a kernel even where zq.kernels.cuda is what is wrong."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from zq.kernels.tiles import Config
from zq.kernels.unit import Unit, arch_number

SOURCES = Path(__file__).resolve().parents[2] / "zq" / "kernels" / "src"
CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
SHARED_LIMIT = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CLUSTER, PDL = 4, 6  # CUlaunchAttributeID


def compile_unit(unit: Unit, arch: str, more: Sequence[str] = ()) -> bytes:
    """The cubin. Raises RuntimeError with the compiler's words."""
    from cuda.bindings import nvrtc

    headers = sorted(SOURCES.glob("*.cuh"))
    macros = [f"-D{name}={value}" for name, value in unit.defines]
    options = [
        f"-arch={arch}",
        "-std=c++17",
        "-default-device",
        "--fmad=false",
        f"-DZQ_ARCH={arch_number(arch)}",
    ]
    options += [*macros, *more]
    source = (SOURCES / unit.source).read_bytes()
    texts, names = [h.read_bytes() for h in headers], [h.name.encode() for h in headers]
    _, program = nvrtc.nvrtcCreateProgram(source, unit.source.encode(), len(headers), texts, names)
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if int(status):
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{unit.name} {arch}: {log.decode()[:2000]}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = b" " * size
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin


def cubin_file(folder: Path, name: str, arch: str, more: Sequence[str] = ()) -> Path:
    switches = "".join(m.replace("-D", "+").replace("=", "") for m in more)
    return folder / f"{name}.{arch}{switches}.cubin"


class LaunchConfig(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


class Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16))


class Driver:
    """The few calls of libcuda that a launch takes, in torch's context."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")
        self.library = ctypes.CDLL("libcuda.so.1")
        self.modules: dict[Path, ctypes.c_void_p] = {}
        self.functions: dict[tuple[Path, str], ctypes.c_void_p] = {}

    def call(self, name: str, *args: object) -> None:
        status = getattr(self.library, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'?').decode()}")

    def function(self, cubin: Path, entry: str) -> ctypes.c_void_p:
        if cubin not in self.modules:
            self.modules[cubin] = ctypes.c_void_p()
            self.call("cuModuleLoadData", ctypes.byref(self.modules[cubin]), cubin.read_bytes())
        if (cubin, entry) not in self.functions:
            found = ctypes.c_void_p()
            self.call("cuModuleGetFunction", ctypes.byref(found), self.modules[cubin], entry.encode())
            self.functions[cubin, entry] = found
        return self.functions[cubin, entry]

    def launch(self, cubin: Path, c: Config, args: Sequence[object]) -> None:
        """args: tensors, None, ints, or bytes-like structures passed by value."""
        values = [_value(a) for a in args]
        array = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        with self.configured(cubin, c) as (function, config):
            self.call("cuLaunchKernelEx", ctypes.byref(config), function, array, None)

    def clusters(self, cubin: Path, c: Config) -> int:
        """How many clusters of this launch the device runs at once."""
        found = ctypes.c_int()
        with self.configured(cubin, c) as (function, config):
            self.call("cuOccupancyMaxActiveClusters", ctypes.byref(found), function, ctypes.byref(config))
        return found.value

    @contextmanager
    def configured(self, cubin: Path, c: Config) -> Iterator[tuple[ctypes.c_void_p, LaunchConfig]]:
        function = self.function(cubin, c.entry)
        self.call("cuFuncSetAttribute", function, SHARED_LIMIT, c.shared)
        self.call("cuFuncSetAttribute", function, CARVEOUT, 100)
        attributes = (Attribute * 2)()
        count = 0
        if c.cluster > 1:
            attributes[count].id = CLUSTER
            attributes[count].value[0:3] = [c.cluster, 1, 1]
            count += 1
        if c.pdl:
            attributes[count].id = PDL
            attributes[count].value[0] = 1
            count += 1
        stream = torch.cuda.current_stream().cuda_stream
        yield (
            function,
            LaunchConfig(*c.grid, c.block, 1, 1, c.shared, stream, ctypes.addressof(attributes), count),
        )

    def tensor_map(self, x: Tensor, rows: int) -> object:
        """A map of x [M, K] (8- or 16-bit) in boxes of rows x 128 bytes."""
        memory = (ctypes.c_char * 192)()
        start = -ctypes.addressof(memory) % 64
        made = (ctypes.c_char * 128).from_buffer(memory, start)
        width, (m, k) = x.element_size(), x.shape
        self.call(
            "cuTensorMapEncodeTiled",
            ctypes.byref(made),
            0 if width == 1 else 1,  # UINT8, UINT16
            2,
            ctypes.c_void_p(x.data_ptr()),
            (ctypes.c_uint64 * 2)(k, m),
            (ctypes.c_uint64 * 1)(x.stride(0) * width),
            (ctypes.c_uint32 * 2)(128 // width, rows),
            (ctypes.c_uint32 * 2)(1, 1),
            0,  # no interleave
            3,  # 128-byte swizzle
            3,  # 256 bytes to L2
            0,  # zeros outside
        )
        return made


def _value(a: object) -> ctypes._SimpleCData | ctypes.Array:  # type: ignore[type-arg]
    if a is None or isinstance(a, Tensor):
        return ctypes.c_void_p(None if a is None else a.data_ptr())
    return ctypes.c_int(a) if isinstance(a, int) else a  # type: ignore[return-value]


def gemm(driver: Driver, folder: Path, c: Config, arch: str, case: dict, more: Sequence[str] = ()) -> None:
    """case: x [M, K], y [M, N], w and whatever else of sx, rowsum, ws, bias the scheme has."""
    x, y = case["x"], case["y"]
    args = [x, case.get("sx"), case.get("rowsum"), case["w"], case.get("ws"), case.get("bias"), y]
    args += [case.get("workspace"), x.shape[0], y.shape[1], x.shape[1], x.stride(0), c.split]
    args += [int(y.dtype == torch.float16)]
    if c.map_rows:
        args.insert(0, driver.tensor_map(x, c.map_rows))
    driver.launch(cubin_file(folder, c.unit, arch, more), c, args)
