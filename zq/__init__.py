"""zq: post-training quantization of large language models.

    import zq
    model = zq.load("OUT")                    # any checkpoint that zq wrote, as a transformers model
    model = zq.optimize(model)                # its blocks fused, on CUDA its steps captured

`import zq` also teaches transformers the format `quant_method: zq`, without importing it: from then on
AutoModelForCausalLM.from_pretrained("OUT") works. Importing zq costs no torch import.
"""

from __future__ import annotations

from typing import Any

from zq import autoload as _autoload
from zq.errors import AuditError, Interrupted, OutputError, ZqError

__version__ = "0.1.0"
__all__ = ["AuditError", "Interrupted", "OutputError", "ZqError", "__version__", "load", "optimize"]

_autoload.install()


def load(folder: str, **options: Any) -> Any:
    """See `zq.runtime.load.load`."""
    from zq.runtime.load import load as load_checkpoint

    return load_checkpoint(folder, **options)


def optimize(model: Any, *, kv: str | None = None, report: bool = False) -> Any:
    """See `zq.runtime.optimize.optimize`."""
    from zq.runtime.optimize import optimize as make_fast

    return make_fast(model, kv=kv, report=report)
