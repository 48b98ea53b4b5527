"""LoRC: a low-rank correction of what quantization left (ZeroQuant-V2, Yao et al. 2023, arXiv:2303.08302).

With W the float weight and W^ the quantized one, the error E = W - W^ [N, K] is approximated by A B, A [N, r]
and B [r, K], which are stored in the dtype of the model beside the codes: the layer computes with W^ + A B,
and what that costs is r (N + K) values.

    weighting: none      least squared error of the weights: the r largest singular values of E (the paper)
               hessian   least squared error of the outputs, tr(D H D^T) with D = E - A B and H = X^T X of
                         the layer's calibration inputs, as it sees them

With H = L L^T both are one problem, the best A B L for E L. Its optimum is a projection, A B = U U^T E, with
U [N, r] the first left singular vectors of E L (L = 1 without weighting). The columns of A and the rows of B
have equal norms, as with the square roots of the singular values in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.quantizers.gptq import factor_of
from zq.quantizers.method import Block, Method, Needs
from zq.spec import Scheme


@dataclass(frozen=True, kw_only=True)
class Options:
    rank: int = 8
    weighting: str = field(default="hessian", metadata={"allowed": ("hessian", "none")})
    damp: float = field(default=0.01, metadata={"range": (0.0, 100.0)})


def factors(error: Tensor, rank: int, upper: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """error [N, K] -> A [N, rank], B [rank, K] in its dtype, rank <= min(N, K).

    `upper` [K, K] is the upper Cholesky factor of H^-1 (gptq.factorise in natural order), so L is its
    inverse; None: H = 1.
    """
    n, k = error.shape
    weighted = error if upper is None else torch.linalg.solve_triangular(upper, error, upper=True, left=False)
    if n <= k:
        u = torch.linalg.eigh(weighted @ weighted.T).eigenvectors[:, -rank:]
    else:
        v = torch.linalg.eigh(weighted.T @ weighted).eigenvectors[:, -rank:]
        u = torch.linalg.qr(weighted @ v).Q
    right = u.T @ error
    split = right.norm(dim=1).sqrt().clamp_min(torch.finfo(error.dtype).tiny)
    return u * split, right / split[:, None]


def run(block: Block, options: Options) -> None:
    """Site after site: the inputs of the next one come through the corrected layers before it."""
    for site in block.sites:
        upper = None
        if options.weighting == "hessian" and block.inputs:  # outside the blocks nobody computes inputs
            upper = factor_of(site, block.second_moments(site)[0], options.damp, "natural").upper
        for layer in site:
            q = layer.quantized
            if q is None:
                raise ZqError(f"step lorc corrects a quantized '{layer.name}'; put gptq or rtn before it")
            left, right = factors(layer.original.float() - q.dequantize(), options.rank, upper)
            stored = block.scale_dtype
            layer.replace(replace(q, left=left.to(stored).contiguous(), right=right.to(stored).contiguous()))


def needs(options: Options) -> Needs:
    return Needs.INPUTS if options.weighting == "hessian" else Needs.NOTHING


def stores(scheme: Scheme, shape: tuple[int, int], options: Options) -> Scheme:
    """The scheme with the rank. Raises ZqError unless it is from 1 to min(N, K)."""
    if not 1 <= options.rank <= min(shape):
        raise ZqError(
            f"'rank: {options.rank}' of step 'lorc' is not allowed; give from 1 to {min(shape)}, the smaller "
            "side of the weight"
        )
    return replace(scheme, weights=replace(scheme.weights, rank=options.rank))


METHOD = Method(name="lorc", options=Options, needs=needs, run=run, stores=stores)
