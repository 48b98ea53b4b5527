"""Whether zq says the kernel that vLLM chooses for packed weights: both are asked, no GPU is needed.

    pip download --no-deps vllm==0.33.0 && unzip vllm-*.whl 'vllm/*.py' -d SOURCES
    PYTHONPATH=SOURCES:. VENV/bin/python benchmarks/vllm_choice.py    # VENV: of vLLM from `make engines`

vLLM's own `choose_mp_linear_kernel` is called with a platform that says to be CUDA of each capability, with
humming there, for bfloat16 on one device. Prints how many cases were compared, and each that differs; exits
with 1 when one does.
"""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import torch
import vllm.model_executor.kernels.linear as linear
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.platforms.interface import DeviceCapability, PlatformEnum
from vllm.scalar_type import scalar_types

from zq.engines import Layer, judge, parse
from zq.spec import Scheme

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
GROUPS = (None, 16, 32, 64, 96, 128, 192, 256)
SHAPES = (
    (512, 512),
    (576, 576),
    (96, 576),
    (1536, 192),
    (4096, 4096),
    (48, 64),
    (64, 96),
    (960, 576),
    (100, 256),
)


class Cuda(SimpleNamespace):
    """As much of a platform as the choice asks for; `sm` is the capability times ten."""

    _enum = PlatformEnum.CUDA
    sm = 0

    def get_device_capability(self, device: int = 0) -> DeviceCapability:
        return DeviceCapability(*divmod(self.sm, 10))

    def is_device_capability(self, wanted: int, device: int = 0) -> bool:
        return wanted == self.sm


def pretend() -> Cuda:
    """Replace the platform wherever vLLM has it."""
    answers = {"is_cuda": True, "is_cuda_alike": True, "is_rocm": False, "is_cpu": False, "is_xpu": False}
    fake = Cuda(**{name: lambda value=value: value for name, value in answers.items()})
    for module in [module for name, module in sys.modules.items() if name.startswith("vllm.")]:
        if hasattr(module, "current_platform"):
            module.current_platform = fake  # type: ignore[attr-defined]
        if hasattr(module, "has_humming"):
            module.has_humming = lambda: True  # type: ignore[attr-defined]
    return fake


def vllms(fake: Cuda, sm: int, scheme: Scheme, shape: tuple[int, int]) -> str:
    w, fake.sm = scheme.weights, sm
    name = f"uint{w.bits}b{1 << (w.bits - 1)}" if w.symmetric else f"uint{w.bits}"
    config = MPLinearLayerConfig(
        full_weight_shape=shape[::-1],
        partition_weight_shape=shape[::-1],
        weight_type=getattr(scalar_types, name),
        act_type=torch.bfloat16,
        group_size=w.layout.size or -1,
        zero_points=not w.symmetric,
    )
    return linear.choose_mp_linear_kernel(config).__name__.removesuffix("LinearKernel").removesuffix("W4A16")


def main() -> None:
    fake = pretend()
    differ = count = 0
    for sm, bits, zeros, group, shape in itertools.product(
        CAPABILITIES, range(2, 9), ("", ":asym"), GROUPS, SHAPES
    ):
        if group and shape[1] % group:
            continue
        scheme = Scheme.parse(f"int{bits}:{f'g{group}' if group else 'channel'}{zeros}")
        layer = Layer(name="layer", shape=shape, scheme=scheme)
        said = judge(parse(f"vllm:sm{sm}"), "compressed-tensors", [layer]).kernels[str(scheme)]
        real = vllms(fake, sm, scheme, shape)
        count += 1
        if f"({real.lower()})" not in said.lower():
            differ += 1
            print(f"sm{sm} {scheme} {list(shape)}: vLLM {real}, zq {said}")
    print(f"{count} cases, {differ} differ")
    raise SystemExit(int(differ > 0))


if __name__ == "__main__":
    main()
