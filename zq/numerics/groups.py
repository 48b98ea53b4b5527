"""Normalise, first half: which values share a scale, as a view [R, G, S] with scales [R, G].

Every layout becomes the same three axes: R rows, G groups in a row, S values in a group.

    tensor    [1, 1, N*K]        channel, token  [N, 1, K]
    group g   [N, ceil(K/g), g]  block b         [1, ceil(N*K/b), b]
    rank1     [N, K, 1]           tile r x c      [ceil(N/r), ceil(K/c), r*c]

With power-of-two groups inside (`pow2=p`) the last axis is split further, [R, G * ceil(S/p), p].

A ragged last group is padded with zeros, which have no error and change neither absmax nor squared error;
where a format has no zero, or the mean is subtracted, with copies of the last value. `ungroup` drops both.
Rank-1 (SM3, arXiv:1901.11150; 4-bit optimizers, arXiv:2309.01507): the scale of a value is the smaller of the
scales of its row and its column, which are what is stored.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zq.spec import TensorSpec, scale_shape


def group(x: Tensor, spec: TensorSpec) -> Tensor:
    """x [N, K] -> [R, G, S]; a view where nothing has to be padded."""
    n, k = x.shape
    kind, size = spec.layout.kind, spec.layout.size or 0
    if kind == "rank1":
        return x.reshape(n, k, 1)
    if kind == "tile":
        tall, size = min(spec.layout.rows, n), min(size, k)
        full = _padded(_padded(x, size, spec).T, tall, spec).T
        tiles = full.reshape(full.shape[0] // tall, tall, full.shape[1] // size, size)
        return tiles.transpose(1, 2).flatten(2)
    rows = x if kind in ("group", "channel", "token") else x.reshape(1, n * k)
    rows = _padded(rows, size or spec.inner or rows.shape[1], spec)
    length = spec.inner or size or rows.shape[1]
    return rows.reshape(rows.shape[0], rows.shape[1] // length, length)


def _padded(rows: Tensor, size: int, spec: TensorSpec) -> Tensor:
    """[R, L] -> [R, a multiple of `size`]."""
    pad = -rows.shape[1] % size
    if not pad:
        return rows
    if spec.info.zero and not spec.center:
        return torch.nn.functional.pad(rows, (0, pad))
    return torch.cat([rows, rows[:, -1:].expand(-1, pad)], 1)


def counted(shape: tuple[int, int], spec: TensorSpec) -> Tensor | None:
    """[1 or R, G, S] with 1 for the values of an [N, K] tensor and 0 for padding; None where padding is no
    error, or code values were estimated with it."""
    if (spec.info.zero and not spec.center) or spec.info.is_estimated:
        return None
    n, k = shape
    zeros = replace(spec, format="int8", center=False)
    if spec.layout.kind == "tile":
        flat = torch.ones(n, k)
    else:
        flat = torch.ones(1, k if spec.layout.kind in ("group", "channel", "token", "rank1") else n * k)
    grouped = group(flat, zeros)
    return None if grouped.numel() == flat.numel() else grouped


def ungroup(x: Tensor, shape: tuple[int, int], spec: TensorSpec) -> Tensor:
    """[R, G, S] -> [N, K], without the padding."""
    n, k = shape
    if spec.layout.kind in ("tensor", "block"):
        return x.reshape(-1)[: n * k].reshape(n, k)
    if spec.layout.kind == "tile":
        tiles = x.unflatten(2, (min(spec.layout.rows, n), -1)).transpose(1, 2)
        return tiles.flatten(2).flatten(0, 1)[:n, :k]
    return x.reshape(n, -1)[:, :k]


def stored_scale(scale: Tensor, shape: tuple[int, int], spec: TensorSpec) -> Tensor:
    """Scales [R, G] -> the shape in which they are stored (`zq.spec.scale_shape`)."""
    if (
        spec.layout.kind == "rank1"
    ):  # the largest of a row of min(row, column) is the row's own, for the columns too
        return torch.cat([scale.amax(1), scale.amax(0)])
    return scale.reshape(scale_shape(spec, shape))


def grouped_scale(scale: Tensor, spec: TensorSpec, rows: int = 0) -> Tensor:
    """Stored scales -> [R, G]. `rows`: N of the [N, K] tensor, which rank-1 scales do not say."""
    if spec.layout.kind == "rank1":
        return torch.minimum(scale[:rows, None], scale[rows:])
    if spec.layout.kind == "tensor":
        return scale.reshape(1, 1)
    if spec.layout.kind == "block":
        return scale.reshape(1, -1)
    return scale
