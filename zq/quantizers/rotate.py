"""Rotate: fold orthogonal matrices into the weights before anything is quantized.

The float model computes the same as before, up to rounding, but its weights and activations have fewer
outliers: what one channel held is spread over all. That helps where many values share a scale (per-channel
weights, per-token activations, few bits) and does little for small groups. Which tensor becomes what is in
zq/models/rotate.py, the matrices are in zq/numerics/rotation.py.

    kind  hadamard  random signs times a Hadamard matrix (QuaRot, arXiv:2404.00456)
          random    a random orthogonal matrix, for sizes that no Hadamard matrix here has
    seed  which signs or numbers, together with the seed of the recipe
    r1    the residual stream. Tied embeddings are untied: the final norm moves into the output head only
    r2    each head between v and o, one matrix per block
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from zq.checkpoint.index import FLOATS, CheckpointIndex
from zq.errors import ZqError
from zq.models.rotate import check_rotatable, folded, plan_folds, sizes
from zq.models.skeleton import Skeleton
from zq.numerics.hadamard import williamson_rows
from zq.numerics.rotation import CHUNK, Rotation, hadamard_rotation, random_rotation
from zq.quantizers.method import Block, Method, Needs
from zq.quantizers.view import View


@dataclass(frozen=True, kw_only=True)
class Options:
    kind: str = field(default="hadamard", metadata={"allowed": ("hadamard", "random")})
    seed: int = 0
    r1: bool = True
    r2: bool = True


def view(skeleton: Skeleton, source: View, options: Options, seed: int) -> View:
    """The rotated model; `seed` is the recipe's. Raises ZqError when it cannot be rotated in this way."""
    if not (options.r1 or options.r2):
        raise ZqError("step rotate with r1: false and r2: false does nothing; drop the step")
    check_rotatable(skeleton, options.r1)
    hidden, head = sizes(skeleton)
    name = f"{seed}:{options.seed}"
    r1 = _rotation(options.kind, hidden, f"{name}:R1", "r1") if options.r1 else None
    blocks = range(skeleton.n_blocks) if options.r2 else ()
    r2 = [_rotation(options.kind, head, f"{name}:R2:{i}", "r2") for i in blocks]
    folds = plan_folds(skeleton, r1, r2)

    keys = {name: skeleton.param_keys.get(name, name) for name in folds}  # a tied head gets a key of its own
    untied = [name for name in folds if name in skeleton.tied]
    tensors = dict(source.index.tensors)
    tensors |= {name: replace(tensors[folds[name].key], name=name) for name in untied}
    index = replace(source.index, tensors=tensors)
    _check_dtypes(index, keys.values())

    config = copy.deepcopy(source.config)
    settings: dict[str, Any] = {}
    if r1:  # said also where it was so: engines tie what the config does not forbid
        config.tie_word_embeddings = settings["tie_word_embeddings"] = False
    facts = {
        "kind": options.kind,
        "r1": hidden if r1 else None,
        "r2": head if r2 else None,
        "tensors": len(folds),
        "untied": untied,
        "config": settings,
    }
    return View(
        config=config,
        index=index,
        read=folded(source.read, {keys[name]: fold for name, fold in folds.items()}, skeleton.device),
        becomes={name: ", ".join(fold.says) for name, fold in folds.items()},
        settings=settings,
        facts={"rotated": facts},
        notes=[_untied_note(index, name, folds[name].key) for name in untied],
        memory=max(index.tensors[key].nbytes for key in keys.values())  # the tensor as it was
        + 8 * (8 * CHUNK + sum(r.base.numel() for r in (r1, *r2) if r)),
    )


def _rotation(kind: str, size: int, seed: str, option: str) -> Rotation:
    if kind == "random":
        return random_rotation(size, seed)
    rotation = hadamard_rotation(size, seed)
    if rotation is None:
        what = "hidden_size" if option == "r1" else "head_dim"
        orders = ", ".join(str(4 * t) for t in williamson_rows())
        raise ZqError(
            f"step rotate has no Hadamard matrix of size {size} ({what}); allowed is 2^k m with m = 1, p + 1 "
            f"or 2 (p + 1) for a prime p where 4 divides m, or m one of {orders}; set kind: random or "
            f"{option}: false, or drop the step"
        )
    return rotation


def _check_dtypes(index: CheckpointIndex, keys: Iterable[str]) -> None:
    for key in keys:
        if index.tensors[key].dtype not in FLOATS:
            raise ZqError(
                f"{index.root}: '{key}' is {index.tensors[key].dtype}, and step rotate works on "
                f"{', '.join(FLOATS)}; start from the original floating-point checkpoint"
            )


def _untied_note(index: CheckpointIndex, name: str, source: str) -> str:
    megabytes = index.tensors[name].nbytes / 1e6
    return f"{name} is untied from {source}, because it takes the final norm: {megabytes:.1f} MB more"


def run(block: Block, options: Options) -> None:
    """Nothing is left to do: the block was read rotated."""


def needs(options: Options) -> Needs:
    return Needs.NOTHING


METHOD = Method(name="rotate", options=Options, needs=needs, run=run, view=view)
