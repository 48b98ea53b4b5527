"""A saved tiny checkpoint per entry of TINY, read with safetensors itself, beside the HF model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.tiny import options, save_tiny
from zq.models.find import find_arch, load_config, model_class
from zq.models.skeleton import Skeleton, build_skeleton


@dataclass(frozen=True)
class Saved:
    """tensors: what the file holds; reference: the model that transformers loads from it."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    reference: PreTrainedModel

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        return {key: self.tensors[key].clone() for key in keys}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_of(self.tensors)

    def skeleton(self, dtype: torch.dtype = torch.float32) -> Skeleton:
        config = load_config(self.folder)
        return build_skeleton(config, find_arch(config, "tiny"), self.shapes, dtype)


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    made: dict[tuple[str, torch.dtype], Saved] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Saved:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            save_tiny(name, folder, dtype)
            cls = model_class(load_config(folder))
            made[name, dtype] = Saved(
                folder=folder,
                tensors=load_file(folder / "model.safetensors"),
                reference=cls.from_pretrained(folder, dtype=dtype, **options(name)).eval(),  # type: ignore
            )
        return made[name, dtype]

    return make
