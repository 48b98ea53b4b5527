"""GPTQ checkpoints as other tools write them too: asymmetric weights in version 1, symmetric ones in
version 2. Read only: what zq writes is in gptq.py. In version 1 the zero point 0 has no place of its own;
where it may be meant, reading fails.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zq.export import gptq
from zq.export.gptq import Read, adapt, refuse, refuse_all, schemes, slots
from zq.numerics.qtensor import QTensor
from zq.spec import Scheme

__all__ = ("adapt", "config", "describes", "pack", "refuse", "refuse_all", "schemes", "slots", "unpack")


def describes(config: dict[str, Any]) -> bool:
    """Whether this `quantization_config` of GPTQ is of such a checkpoint."""
    other = gptq.VERSIONS[0 if config.get("sym", True) else 1]
    return config.get("checkpoint_format", "gptq") == other


def pack(name: str, q: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    """Asymmetric zero points from 1 on."""
    return gptq.packed(name, q, 1 - gptq.below(q.spec))


def unpack(name: str, read: Read, scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    """Raises ZqError for act-order, and for zero points that readers do not agree on."""
    return gptq.unpacked(name, read, scheme, shape, 1 - gptq.below(scheme.weights))


def config(assigned: dict[str, Scheme], skipped: list[str]) -> dict[str, Any]:
    made = gptq.config(assigned, skipped)
    return made | {"checkpoint_format": gptq.VERSIONS[1 - gptq.VERSIONS.index(made["checkpoint_format"])]}
