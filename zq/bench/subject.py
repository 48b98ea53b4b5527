"""What is measured: a checkpoint or a shape, and what it is compared with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zq.bench.shapes import shape_config
from zq.bench.synthetic import empty, random_model, schemes
from zq.errors import ZqError
from zq.models.families import FAMILIES
from zq.models.find import load_config, position_limit
from zq.runtime.load import load, quantization_config
from zq.runtime.optimize import optimize

ENGINES = ("zq", "eager", "compiled")  # in the order in which they are measured
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """folder: a checkpoint; None: `shape` with `layers` blocks (None: its own) in `scheme`. against: the
    folder of the original, "random" for random weights in its place, None for nothing. dtype: a name of
    DTYPES; None: as stored, bfloat16 for random weights."""

    folder: Path | None = None
    shape: str = ""
    layers: int | None = None
    scheme: str = ""
    against: str | None = None
    dtype: str | None = None

    def config(self) -> Any:
        """transformers' config, without a quantization. Raises ZqError."""
        if self.folder is None:
            return shape_config(self.shape, self.layers)
        config: Any = copy.deepcopy(load_config(self.folder))
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    @property
    def is_encoder(self) -> bool:
        return FAMILIES[self.config().model_type].encoder

    @property
    def positions(self) -> int | None:
        config = self.config()
        return position_limit(config, FAMILIES[config.model_type])

    def check(self) -> None:
        """Raises ZqError for what `build` would raise later, in a child."""
        config = self.config()
        if self.folder is None:
            schemes(empty(config, torch.bfloat16, "cpu"), self.scheme)
        if self.against in (None, RANDOM):
            return
        original = Path(str(self.against))
        if quantization_config(original) is not None:
            raise ZqError(f"--against {original} is quantized itself; give the original, or random")
        other = load_config(original)
        for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            if getattr(config, name) != getattr(other, name):
                raise ZqError(
                    f"--against {original} is another model: its {name} is {getattr(other, name)}, that of "
                    f"{self.folder} is {getattr(config, name)}; give the original of this checkpoint"
                )

    def build(self, engine: str, device: str) -> Any:
        """The model of one of ENGINES, on `device`. Raises ZqError."""
        dtype = DTYPES[self.dtype] if self.dtype else None
        if engine == "zq":
            if self.folder is not None:
                return optimize(load(self.folder, device=device, dtype=dtype))
            config, dtype = self.config(), dtype or torch.bfloat16
            assigned = schemes(empty(config, dtype, "cpu"), self.scheme)
            return optimize(random_model(config, dtype, device, assigned))
        if self.against == RANDOM:
            return random_model(self.config(), dtype or torch.bfloat16, device)
        return load(str(self.against), device=device, dtype=dtype)
