"""GPTQ: round one input column at a time and let the columns that are left make up for the error.

For a layer y = W x with inputs X (tokens in rows) the squared output error is tr(dW H dW^T), H = X^T X.
Columns are taken in the order of decreasing H_kk. With U the upper Cholesky factor of H^-1 (in that order)

    q_k = round(w_k),   e = (w_k - q_k) / U_kk,   w_j -= e U_kj   for all j > k

which is optimal brain surgery with a fixed order (Frantar et al. 2022, arXiv:2210.17323); the update of
distant columns is done once per block of columns as a matrix product.

Scales are fixed before the first column is rounded ("static groups"), each by the least squared error of its
group, weighted by H_kk^importance, so the order of the columns leaves no trace in the checkpoint.

`asymmetry` a: the inputs X come through quantized blocks, while the target is W X_f with inputs X_f of the
float model. The weights that minimise ||W' X - W X_f||^2 are W + W D (H + damp)^-1, D = (X_f - X)^T X; a of
that step is taken before rounding (QEP, arXiv:2504.09629), by the same factor of H + damp.

`windows` w: the Hessian is that of the first w calibration windows, in whole batches; 0 takes all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.numerics.groups import group
from zq.numerics.qtensor import SCALES, QTensor, assemble, encode, fake_groups, keep, split_rows, without
from zq.numerics.scales import DTYPES, Scale
from zq.quantizers import rtn
from zq.quantizers.method import Block, Layer, Method, Needs
from zq.spec import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Options:
    scale: str = field(default="mse", metadata={"allowed": tuple(SCALES)})
    order: str = field(default="activation", metadata={"allowed": ("activation", "natural")})
    damp: float = field(default=0.01, metadata={"range": (0.0, 100.0)})
    columns: int = field(default=128, metadata={"range": (1, 1 << 20)})
    asymmetry: float = field(default=0.0, metadata={"range": (0.0, 1.0)})
    windows: int = field(default=0, metadata={"range": (0, 1 << 20)})
    importance: float = field(default=1.0, metadata={"range": (0.0, 1.0)})


@dataclass(frozen=True)
class Factor:
    """What all layers of a site share: column order [K], U [K, K] upper triangular, diag(H) [K]."""

    order: Tensor
    upper: Tensor
    diagonal: Tensor


def factorise(hessian: Tensor, damp: float, order: str = "activation") -> Factor:
    """hessian [K, K], symmetric, positive semidefinite -> Factor in the same dtype.

    `damp` times the mean of the diagonal is added to it, ten times more whenever the factorisation fails.
    Inputs that were always zero get the mean. Raises ZqError when it is not finite, or no damping up to 100
    helps.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ZqError(
            "the Hessian of its calibration inputs holds NaN or Inf and cannot be factorised; save the model "
            "in a dtype that its activations do not overflow, such as bfloat16, or skip the layer with a rule"
        )
    h = hessian.clone()
    diagonal = h.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(h.dtype).tiny)
    diagonal[diagonal == 0] = mean
    kept = diagonal.clone()
    columns = torch.arange(len(h), device=h.device)
    if order == "activation":
        columns = torch.argsort(kept, descending=True, stable=True)
    h = h[columns][:, columns]
    amount = damp
    while amount <= 100:
        damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (amount * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return Factor(columns, upper, kept)
        amount = 10 * amount or 1e-4
    raise ZqError(
        "the Hessian of its calibration inputs cannot be factorised; use other or more calibration text"
    )


def factor_of(site: list[Layer], hessian: Tensor, damp: float, order: str) -> Factor:
    """`factorise` for the layers of a site; a ZqError names the first."""
    try:
        return factorise(hessian, damp, order)
    except ZqError as error:
        raise ZqError(f"'{site[0].name}': {error}") from None


def quantize_weight(
    weight: Tensor,
    factor: Factor,
    spec: TensorSpec,
    scale_dtype: torch.dtype,
    *,
    scale: str = "mse",
    columns: int = 128,
    places: Tensor | None = None,
    importance: float = 1.0,
) -> tuple[QTensor, Tensor]:
    """weight [N, K] float -> (QTensor, latent [N, K]).

    The latent is the value that each column had when it was rounded: rounding it again to nearest with the
    same scales gives the same codes. Computed in the dtype of the factor. The columns `places` are rounded to
    `scale_dtype` only, and take up the errors of the columns before them. `importance` is the power of
    diag(H) that weighs the errors by which scales are chosen.
    """
    shape = (weight.shape[0], weight.shape[1])
    dtype = DTYPES[spec.scale_dtype] if spec.scale_dtype else scale_dtype
    work = weight.to(factor.upper.dtype)
    weights = None
    each = factor.diagonal.float() ** importance
    if spec.layout.kind in ("group", "channel", "token", "tile"):
        weights = group(each.expand(min(spec.layout.rows, shape[0]), -1), spec)
    elif spec.layout.kind == "rank1":
        weights = each.reshape(1, -1, 1)
    coded = work.float() if places is None else without(work.float(), places)
    chosen = SCALES[scale](group(coded, spec), spec, dtype, weights)
    kept = {} if places is None else dict.fromkeys(places.tolist(), scale_dtype)
    latent = _compensate(work, factor, spec, chosen, columns, kept)
    coded = latent.float() if places is None else without(latent.float(), places)
    q = assemble(encode(group(coded, spec), spec, chosen), chosen, spec, shape, dtype)
    return q if places is None else keep(q, latent, places, scale_dtype), latent


def _compensate(
    work: Tensor, factor: Factor, spec: TensorSpec, scale: Scale, columns: int, kept: dict[int, torch.dtype]
) -> Tensor:
    """Run over the columns in order; returns the latent in the original order of columns. `kept`: the dtypes
    to which some columns are rounded instead of to codes."""
    n, k = work.shape
    upper, order = factor.upper, factor.order.tolist()
    step = _per_column(scale.step, spec, n, k)[:, factor.order]
    zero, center = (
        None if part is None else _per_column(part, spec, n, k)[:, factor.order]
        for part in (scale.zero, scale.center)
    )
    w = work[:, factor.order].clone()
    latent = torch.empty_like(w)
    for start in range(0, k, columns):
        end = min(start + columns, k)
        errors = torch.empty(n, end - start, dtype=w.dtype, device=w.device)
        for c in range(start, end):
            column = w[:, c]
            latent[:, c] = column
            one = Scale(
                step[:, c : c + 1],
                zero=None if zero is None else zero[:, c : c + 1],
                center=None if center is None else center[:, c : c + 1],
                book=scale.book,
            )
            dtype = kept.get(order[c])
            rounded = _round(column, spec, one) if dtype is None else column.to(dtype).to(column.dtype)
            errors[:, c - start] = (column - rounded) / upper[c, c]
            w[:, c + 1 : end] -= errors[:, c - start, None] * upper[c, c + 1 : end]
        w[:, end:] -= errors @ upper[start:end, end:]
    back = torch.empty_like(latent)
    back[:, factor.order] = latent
    return back


def _round(column: Tensor, spec: TensorSpec, scale: Scale) -> Tensor:
    """One column [N] to its codes and back, in float32 as everywhere; scale.step is [N, 1]."""
    return fake_groups(column.float().reshape(-1, 1, 1), spec, scale).reshape(-1).to(column.dtype)


def _per_column(scale: Tensor, spec: TensorSpec, n: int, k: int) -> Tensor:
    """Scales [R, G] -> [N, K]."""
    size = spec.inner or spec.layout.size or 1
    if spec.layout.kind == "rank1":
        return scale
    if spec.layout.kind in ("tensor", "channel", "token") and not spec.inner:
        return scale.expand(n, k)
    if spec.layout.kind in ("tensor", "block"):
        return scale.reshape(-1).repeat_interleave(size)[: n * k].reshape(n, k)
    rows = scale.repeat_interleave(spec.layout.rows, dim=0)[:n]
    return rows.expand(n, -1).repeat_interleave(size, dim=1)[:, :k]


def correction(weight: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """W D (H + damp)^-1 [N, K], the step from W to the weights that undo the error of the inputs."""
    order, upper = factor.order, factor.upper
    back = torch.empty_like(weight, dtype=upper.dtype)
    back[:, order] = (weight.to(upper.dtype) @ cross)[:, order] @ upper.T @ upper
    return back


def run(block: Block, options: Options) -> None:
    """Site after site, each with the inputs that the sites before it, already quantized, leave it."""
    if not block.inputs:  # a layer outside the blocks, whose inputs nobody computes
        return rtn.run(block, rtn.Options(scale=options.scale))
    for site in block.sites:
        hessian, cross = block.second_moments(site, options.asymmetry > 0, options.windows)
        factor = factor_of(site, hessian, options.damp, options.order)
        for layers in _stackable(site):
            weights = [_target(layer, factor, cross, options) for layer in layers]
            spec = layers[0].scheme.weights
            stacked, latent = quantize_weight(
                torch.cat(weights),
                factor,
                spec,
                block.scale_dtype,
                scale=options.scale,
                columns=options.columns,
                places=layers[0].places,
                importance=options.importance,
            )
            rows = [len(weight) for weight in weights]
            for layer, part, kept in zip(layers, split_rows(stacked, rows), latent.split(rows), strict=True):
                layer.replace(part)
                layer.latent = kept


def _target(layer: Layer, factor: Factor, cross: Tensor | None, options: Options) -> Tensor:
    weight = layer.weight.float()
    if not bool(torch.isfinite(weight).all()):
        raise ZqError(f"'{layer.name}.weight' holds NaN or Inf; repair the checkpoint first")
    if cross is None:
        return weight
    return weight + options.asymmetry * correction(weight, cross, factor)


def _stackable(site: list[Layer]) -> list[list[Layer]]:
    """Layers of one spec whose scales do not cross rows are one matrix with more rows."""
    stacks: dict[object, list[Layer]] = {}
    for layer in site:
        spec = layer.scheme.weights
        by_row = spec.layout.kind == "channel" or (spec.layout.kind == "group" and not spec.info.is_estimated)
        stacks.setdefault(spec if by_row else layer.name, []).append(layer)
    return list(stacks.values())


def needs(options: Options) -> Needs:
    return Needs.INPUTS | (Needs.TEACHER if options.asymmetry else Needs.NOTHING)


METHOD = Method(name="gptq", options=Options, needs=needs, run=run)
