"""Rotations folded into the weights of a pre-norm model with RMSNorm: which tensor becomes what.

    R1 [D, D]      of the residual stream: every hidden state h becomes h R1
    R2 [d, d]      of each head between v and o, one per block: every value v becomes v R2

    embeddings E          E R1
    RMSNorm weight gamma  1; it moves into the linears that read the norm
    reads the stream      W diag(gamma) R1           q, k, v, gate, up, the output head
    writes to it          R1^T W,  R1^T b            o, down
    v, per head           R2^T W,  R2^T b
    o, per head           W R2

RMS(h R1) = RMS(h) for every orthogonal R1, so the model computes the same function, and the rotations cost
nothing afterwards (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406). LayerNorm subtracts the mean
along a direction that R1 would turn, and a norm on the stream itself (post-norm) has nowhere to go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zq.errors import ZqError
from zq.models.families import FAMILIES
from zq.models.skeleton import Read, Skeleton
from zq.numerics.rotation import Rotation, rotate_weight

ONES, NORM, R1, R2 = "becomes ones", "takes the norm before it", "rotated by R1", "rotated by R2"


@dataclass(frozen=True, kw_only=True)
class Fold:
    """What becomes of the tensor under `key`: Out^T W diag(gamma) In, `gamma` a key; or 1 (`ones`), for a
    norm that was moved. `says` tells it to people."""

    key: str
    gamma: str | None = None
    inputs: Rotation | None = None
    outputs: Rotation | None = None
    ones: bool = False
    says: tuple[str, ...] = ()

    def apply(self, read: Read, device: torch.device | str) -> Tensor:
        """The tensor in its own dtype. Raises ZqError when it or gamma holds NaN or Inf, or it overflows."""
        tensors = read([self.key, self.gamma] if self.gamma else [self.key])
        for key, value in tensors.items():
            if not _is_finite(value):
                raise ZqError(f"'{key}' holds NaN or Inf; repair the checkpoint first")
        tensor = tensors[self.key]
        if self.ones:
            return torch.ones_like(tensor)
        gamma = tensors[self.gamma] if self.gamma else None
        matrix = tensor if tensor.ndim == 2 else tensor[:, None]
        rotated = rotate_weight(matrix, self.outputs, gamma, self.inputs, device).reshape(tensor.shape)
        if not _is_finite(rotated):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ZqError(
                f"'{self.key}' leaves the range of {dtype} when it is rotated; save the model in bfloat16 or "
                "float32 first, or drop the step rotate"
            )
        return rotated


def folded(read: Read, folds: dict[str, Fold], device: torch.device | str) -> Read:
    """`read`, but what it returns under the keys of `folds` is folded."""

    def read_folded(keys: Iterable[str]) -> dict[str, Tensor]:
        keys = list(keys)
        tensors = read([key for key in keys if key not in folds])
        return {key: folds[key].apply(read, device) if key in folds else tensors[key] for key in keys}

    return read_folded


def check_rotatable(skeleton: Skeleton, r1: bool) -> None:
    """Raises ZqError when this model is not of the kind that the module docstring describes."""
    arch, cls = skeleton.arch, type(skeleton.model).__name__
    if not arch.writers:
        allowed = ", ".join(a.model_type for a in FAMILIES.values() if a.writers)
        raise ZqError(
            f"step rotate cannot be folded into a {arch.model_type} model: its norms subtract a mean or act "
            f"on the residual stream itself; allowed are {allowed}; drop the step"
        )
    if r1 and _head(skeleton.model) is None:
        raise ZqError(
            f"step rotate: {cls} has no language-model head to take the final norm and R1; start from a "
            "checkpoint of the whole model, or set r1: false"
        )


def sizes(skeleton: Skeleton) -> tuple[int, int]:
    """(D, d): channels of the residual stream, and of one head."""
    config = skeleton.config
    return config.hidden_size, getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )


def plan_folds(skeleton: Skeleton, r1: Rotation | None, r2: list[Rotation]) -> dict[str, Fold]:
    """Full parameter name -> what becomes of it. `r2` has one rotation per block; either may be left out."""
    folds: dict[str, Fold] = {}
    for i in range(skeleton.n_blocks):
        folds |= _block_folds(skeleton, i, r1, r2[i] if r2 else None)
    if r1:
        model = skeleton.model
        norm = f"{skeleton.base_prefix}{skeleton.arch.tail[0]}.weight"
        embedding, head = (_weight_of(model, m) for m in (model.get_input_embeddings(), _head(model)))
        gamma = skeleton.key_of(norm)
        folds[embedding] = Fold(key=skeleton.key_of(embedding), inputs=r1, says=(R1,))
        folds[norm] = Fold(key=gamma, ones=True, says=(ONES,))
        folds[head] = Fold(key=skeleton.key_of(head), gamma=gamma, inputs=r1, says=(NORM, R1))
    return folds


def _block_folds(skeleton: Skeleton, i: int, r1: Rotation | None, r2: Rotation | None) -> dict[str, Fold]:
    arch, prefix = skeleton.arch, skeleton.block_prefix(i)
    keys = {path: skeleton.key_of(f"{prefix}.{path}.weight") for s in arch.sites for path in s.linears}
    linears = {path: Fold(key=key) for path, key in keys.items()}
    folds: dict[str, Fold] = {}

    def add(path: str, *says: str, **changes: Any) -> None:
        linears[path] = replace(linears[path], says=linears[path].says + says, **changes)

    if r1:
        for link in arch.links:
            if link.kind == "norm":
                norm = f"{prefix}.{link.producer}.weight"
                gamma = skeleton.key_of(norm)
                folds[norm] = Fold(key=gamma, ones=True, says=(ONES,))
                for path in link.consumers:
                    add(path, NORM, R1, gamma=gamma, inputs=r1)
        for path in arch.writers:
            add(path, R1, outputs=r1)
    if r2:
        values = next(link for link in arch.links if link.channels == "kv")
        add(values.producer, R2, outputs=r2)
        for path in values.consumers:
            add(path, R2, inputs=r2)
    for path, fold in linears.items():
        if fold.says:
            folds[f"{prefix}.{path}.weight"] = fold
        bias = f"{prefix}.{path}.bias"
        if fold.outputs and bias in skeleton.param_keys:
            says = (R1 if fold.outputs is r1 else R2,)
            folds[bias] = Fold(key=skeleton.key_of(bias), outputs=fold.outputs, says=says)
    return folds


def _is_finite(x: Tensor) -> bool:
    """Whether no value is NaN or Inf, without a copy of the whole tensor."""
    return bool(torch.isfinite(torch.stack(x.aminmax())).all())


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings()  # type: ignore[operator]


def _weight_of(model: nn.Module, module: nn.Module | None) -> str:
    """Full name of the weight of this module."""
    return next(f"{name}.weight" for name, other in model.named_modules() if other is module)
