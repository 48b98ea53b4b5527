"""Cubins on a device: load, look up, launch on torch's current stream. Uses cuda.bindings, which CUDA builds
of torch bring; nothing here runs before the first call of an operator on a CUDA tensor, or `prepare`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.kernels import bundle
from zq.kernels.table import UNITS
from zq.kernels.unit import Unit, arch_number, arch_of

GRID = tuple[int, int, int]
ALIGNED = 16  # bytes that a kernel reads at a time


@dataclass(frozen=True)
class Device:
    """index in torch's order, architecture to compile for ("sm_90a") and as a number (90), multiprocessors,
    the largest shared memory of a block in bytes, and the context that torch uses."""

    index: int
    arch: str
    number: int
    sms: int
    shared: int
    context: Any


_functions: dict[tuple[int, str], dict[str, Any]] = {}
_lock = threading.Lock()
_thread = threading.local()


def prepare(device: torch.device | str | int = "cuda", units: Iterable[str] | None = None) -> None:
    """Load kernels on a device, compiling what is in no bundle and not in the cache.

    units: names out of `zq.kernels.table.UNITS`; all that the device can run when None. After it, operators
    can be captured into CUDA graphs. Raises ZqError.
    """
    place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    here = describe(torch.cuda.current_device() if place.index is None else place.index)
    names = [unit.name for unit in UNITS.values() if here.arch in unit.archs] if units is None else units
    for name in names:
        functions(here, name)


@lru_cache
def describe(index: int) -> Device:
    """The device `index`. Raises ZqError when zq has no kernels for it."""
    driver = _driver()
    torch.cuda.init()
    facts = torch.cuda.get_device_properties(index)
    arch = arch_of((facts.major, facts.minor))
    handle = checked(driver.cuDeviceGet(index), "find the device")
    wanted = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    shared = checked(driver.cuDeviceGetAttribute(wanted, handle), "ask the device")
    context = checked(driver.cuDevicePrimaryCtxRetain(handle), "find torch's context")
    return Device(index, arch, arch_number(arch), facts.multi_processor_count, shared, context)


def functions(device: Device, name: str) -> dict[str, Any]:
    """The kernels of a unit on a device, by entry; loaded at the first call. Raises ZqError."""
    found = _functions.get((device.index, name))
    if found is not None:
        return found
    with _lock:
        if (device.index, name) not in _functions:
            if torch.cuda.is_current_stream_capturing():
                raise ZqError(
                    f"kernel {name} is not loaded, and a CUDA graph is being captured; call "
                    "zq.kernels.cuda.prepare(device), or run once before capturing"
                )
            _functions[device.index, name] = _load(device, UNITS[name])
    return _functions[device.index, name]


def _load(device: Device, unit: Unit) -> dict[str, Any]:
    driver = _driver()
    data = bundle.cubin(unit, device.arch)
    enter(device)
    what = (
        f"load kernel {unit.name} for {device.arch} (was it compiled by a newer NVRTC than the driver knows?)"
    )
    module = checked(driver.cuModuleLoadData(data), what)
    found = {}
    attribute = driver.CUfunction_attribute
    for entry in unit.entries:
        function = checked(driver.cuModuleGetFunction(module, entry.encode()), f"find {entry} in {unit.name}")
        static = checked(
            driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function), what
        )
        dynamic = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, dynamic, device.shared - static), what)
        carveout = attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        checked(driver.cuFuncSetAttribute(function, carveout, 100), what)  # so that two blocks may fit
        found[entry] = function
    return found


def launch(  # noqa: PLR0913
    device: Device,
    unit: str,
    entry: str,
    grid: GRID,
    block: int,
    arguments: Sequence[Any],
    *,
    shared: int = 0,
    cluster: int = 1,
    pdl: bool = False,
) -> None:
    """Launch on the current stream of the device. arguments: ctypes values, or objects with `getPtr()`.

    pdl: the kernel may begin before the one in front of it has ended (sm_90 and newer; it waits itself).
    """
    driver = _driver()
    function = functions(device, unit)[entry]
    enter(device)
    stream = raw_stream(device.index)
    config = configuration(grid, block, shared, cluster, pdl and device.number >= 90, stream)
    places = [a.getPtr() if hasattr(a, "getPtr") else ctypes.addressof(a) for a in arguments]
    array = (ctypes.c_void_p * len(places))(*places)
    checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(array), 0), f"launch {unit}")


@lru_cache(maxsize=4096)
def configuration(grid: GRID, block: int, shared: int, cluster: int, pdl: bool, stream: int) -> Any:
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes = shared
    config.hStream = stream
    attributes = []
    if cluster > 1:
        value = driver.CUlaunchAttributeValue()
        value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = cluster, 1, 1
        attributes.append((driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, value))
    if pdl:
        value = driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attributes.append(
            (driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, value)
        )
    made = []
    for name, value in attributes:
        attribute = driver.CUlaunchAttribute()
        attribute.id, attribute.value = name, value
        made.append(attribute)
    config.attrs, config.numAttrs = made, len(made)
    return config


def raw_stream(index: int) -> int:
    """torch's current stream on a device, without an object around it."""
    return torch._C._cuda_getCurrentRawStream(index)


@lru_cache(maxsize=1)
def library() -> Any:
    """libcuda itself, which takes prepared structures as they are."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4
    library.cuLaunchKernelEx.restype = ctypes.c_int
    return library


class TensorMap:
    """A CUtensorMap. cuda.bindings aligns its own to 16 bytes, and encoding needs 64."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_char * 192)()
        self._address = -(-ctypes.addressof(self._memory) // 64) * 64

    def getPtr(self) -> int:
        return self._address


@lru_cache(maxsize=4096)
def tensor_map(pointer: int, rows: int, k: int, stride: int, width: int, box_rows: int) -> TensorMap:
    """Describes a row-major matrix [rows, k] at `pointer`, `width` bytes in an element and `stride` elements
    from row to row, to be fetched in boxes of box_rows x 128 bytes with the 128-byte swizzle; zeros
    outside."""
    driver = _driver()
    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8 if width == 1 else kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16
    modes = (
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    made = TensorMap()
    status = library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(made.getPtr()),
        int(kind),
        ctypes.c_uint32(2),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 2)(k, rows),
        (ctypes.c_uint64 * 1)(stride * width),
        (ctypes.c_uint32 * 2)(128 // width, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        *map(int, modes),
    )
    checked((driver.CUresult(status),), f"describe a matrix of {rows} x {k} to the copy engine")
    return made


_workspaces: dict[tuple[int, int, int], list[Tensor]] = {}


def workspace(device: Device, size: int, zeroed: int) -> Tensor | None:
    """Scratch memory of a kernel: `size` bytes that begin with `zeroed` bytes of counters, which are zero and
    which the kernel leaves zero. One buffer per stream and number of counters; outgrown ones are kept, since
    a CUDA graph may still use them. A graph that is captured before there is one gets its own, zeroed with
    every replay."""
    if size == 0:
        return None
    if zeroed == 0:
        return torch.empty(size, dtype=torch.uint8, device=f"cuda:{device.index}")
    stream = raw_stream(device.index)
    made = _workspaces.setdefault((device.index, stream, zeroed), [])
    if not made or made[-1].numel() < size:
        fresh = torch.zeros(size, dtype=torch.uint8, device=f"cuda:{device.index}")
        if torch.cuda.is_current_stream_capturing():
            return fresh
        made.append(fresh)
    return made[-1]


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Address of a tensor for a kernel that reads 16 bytes at a time; 0 for None. Raises ZqError."""
    address = 0 if x is None else x.data_ptr()
    if address % ALIGNED:
        raise unaligned()
    return ctypes.c_void_p(address)


def no_fp8(device: Device) -> ZqError:
    return ZqError(f"{device.arch} has no FP8; use INT8 activations")


def unaligned() -> ZqError:
    return ZqError(
        f"a tensor does not begin at a multiple of {ALIGNED} bytes, as kernels need; "
        "call .clone() on the slice"
    )


def checked(answer: tuple[Any, ...], what: str) -> Any:
    """What a call of the driver gave besides its status."""
    status, *rest = answer
    if int(status):
        raise ZqError(f"CUDA could not {what}: {status.name}; compute without kernels, and report it")
    return rest[0] if len(rest) == 1 else rest


def failed(status: int, what: str) -> None:
    """Raises ZqError for a status other than success that libcuda itself gave."""
    checked((_driver().CUresult(status),), what)


def enter(device: Device) -> None:
    """Make torch's context current: a new thread has none, and torch may be on another device."""
    if getattr(_thread, "index", None) != device.index or torch.cuda.current_device() != device.index:
        checked(_driver().cuCtxSetCurrent(device.context), "use torch's context")
        _thread.index = device.index


@lru_cache
def _driver() -> Any:
    try:
        return import_module("cuda.bindings.driver")
    except ImportError as error:
        raise ZqError(
            f"kernels are launched with cuda-bindings, which is not installed ({error}); "
            "run: pip install 'zq[kernels]'"
        ) from None
