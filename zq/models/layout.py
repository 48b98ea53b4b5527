"""What is where in a model: which linears a block holds, which zone each parameter belongs to, ties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from zq.models.arch import Arch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Same = Callable[[str, str], bool]


@dataclass(frozen=True, kw_only=True)
class LinearInfo:
    """A linear inside a block: y[n] = W x[k] + b.

    name: full module name; site, kind: from the family's description; n, k: outputs and inputs.
    transposed: the weight is stored [k, n] (Conv1D of GPT-2), else [n, k]. bias: it has one.
    """

    name: str
    site: str
    kind: str
    n: int
    k: int
    transposed: bool
    bias: bool


def uncovered(arch: Arch, block: nn.Module) -> set[str]:
    """Paths that the description and this block disagree on: never skip a layer silently.

    A linear or any parameter of two or more dimensions (fused experts) in no site, a linear in
    several sites, a site's linear that the block does not have.
    """
    described = [path for site in arch.sites for path in site.linears]
    linears = {name for name, module in block.named_modules() if is_linear(module)}
    matrices = {name.rpartition(".")[0] for name, w in block.named_parameters() if w.ndim > 1}
    twice = {path for path in described if described.count(path) > 1}
    return ((linears | matrices) ^ set(described)) | twice


def settle_ties(
    found: dict[str, str], declared: Mapping[str, str], same: Same
) -> tuple[dict[str, str], dict[str, str]]:
    """Reconcile the class's ties (target -> source) with what the checkpoint stores.

    Only one of the two is stored: tied, and the source owns the key. Both are, with the same content:
    tied, and the target's copy is not used. Both are, and they differ: two parameters. Neither: the
    source is missing. This is what transformers does.
    """
    found, tied = dict(found), {}
    for target, source in declared.items():
        if target in found and source in found:
            if not same(found[target], found[source]):
                continue
            del found[target]
        elif target in found:
            found[source] = found.pop(target)
        tied[target] = source
    return found, tied


def base_prefix(model: PreTrainedModel) -> str:
    """Full name of the base model with a trailing dot; "" when the model is its own base."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def zones(model: PreTrainedModel, arch: Arch, every: Iterable[str]) -> dict[int | str, list[str]]:
    """Split full names into the zones 0, 1, ... (blocks), "outside" and "tail".

    Tail is what lies outside the base model (heads) and the description's `tail` and `pooler`.
    """
    base = base_prefix(model)
    inside = f"{base}{arch.blocks}."
    late = tuple(f"{base}{path}." for path in (*arch.tail, arch.pooler) if path)
    count = len(model.get_submodule(base + arch.blocks))  # type: ignore[arg-type]
    zones: dict[int | str, list[str]] = {"outside": [], "tail": []}
    zones |= {i: [] for i in range(count)}
    for name in every:
        if name.startswith(inside):
            zones[int(name.removeprefix(inside).split(".")[0])].append(name)
        elif not name.startswith(base) or name.startswith(late):
            zones["tail"].append(name)
        else:
            zones["outside"].append(name)
    return zones


def is_linear(module: nn.Module) -> bool:
    """Whether this is a matrix product that zq quantizes: nn.Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether this linear stores its weight as [k, n]: transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(n, k), outputs and inputs, of a linear; its weight may be on meta."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    n, k = (columns, rows) if is_transposed(module) else (rows, columns)
    return int(n), int(k)  # type: ignore[arg-type]


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Full name -> (n, k) of every linear of a model, in its own order."""
    return {name: linear_shape(module) for name, module in model.named_modules() if is_linear(module)}


def linear_info(module: nn.Module, name: str, site: str, kind: str) -> LinearInfo:
    """Read sizes off a linear (its weight may be on meta)."""
    n, k = linear_shape(module)
    return LinearInfo(
        name=name,
        site=site,
        kind=kind,
        n=n,
        k=k,
        transposed=is_transposed(module),
        bias=module.bias is not None,
    )
