"""Normalise, first half: which values share a scale, as a view [R, G, S] with scales [R, G].

Every layout becomes the same three axes: R rows, G groups in a row, S values in a group.

    tensor    [1, 1, N*K]        channel, token  [N, 1, K]
    group g   [N, ceil(K/g), g]  block b         [1, ceil(N*K/b), b]

A ragged last group is padded with zeros. Zero is a value of every format and has no error, so padding
changes neither absmax nor squared error; `ungroup` drops it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zq.spec import TensorSpec, scale_shape


def group(x: Tensor, spec: TensorSpec) -> Tensor:
    """x [N, K] -> [R, G, S]; a view where nothing has to be padded."""
    n, k = x.shape
    kind, size = spec.layout.kind, spec.layout.size or 0
    if kind == "tensor":
        return x.reshape(1, 1, n * k)
    if kind in ("channel", "token"):
        return x.reshape(n, 1, k)
    rows = x if kind == "group" else x.reshape(1, n * k)
    pad = -rows.shape[1] % size
    if pad:
        rows = torch.nn.functional.pad(rows, (0, pad))
    return rows.reshape(rows.shape[0], -1, size)


def ungroup(x: Tensor, shape: tuple[int, int], spec: TensorSpec) -> Tensor:
    """[R, G, S] -> [N, K], without the padding."""
    n, k = shape
    kind = spec.layout.kind
    if kind == "group":
        return x.reshape(n, -1)[:, :k]
    return x.reshape(-1)[: n * k].reshape(n, k)


def stored_scale(scale: Tensor, shape: tuple[int, int], spec: TensorSpec) -> Tensor:
    """Scales [R, G] -> the shape in which they are stored (`zq.spec.scale_shape`)."""
    return scale.reshape(scale_shape(spec, shape))


def grouped_scale(scale: Tensor, spec: TensorSpec) -> Tensor:
    """Stored scales -> [R, G]."""
    if spec.layout.kind == "tensor":
        return scale.reshape(1, 1)
    if spec.layout.kind == "block":
        return scale.reshape(1, -1)
    return scale
