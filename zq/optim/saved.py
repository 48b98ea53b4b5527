"""What `state_dict` gave, and what becomes of it: checked as a whole before anything changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.optim.checks import is_number, options
from zq.optim.config import States, checked
from zq.optim.storage import Factored, Full, Quantized, State, new


def document(saved: Any, groups: list[dict[str, Any]], needed: set[str], kind: str) -> None:
    """That `saved` is a state_dict of as many groups and parameters as `groups`. Raises ZqError."""
    if not _is_document(saved):
        raise ZqError("what is to be loaded is no state_dict of an optimizer (state, param_groups)")
    found = [len(group["params"]) for group in saved["param_groups"]]
    wanted = [len(group["params"]) for group in groups]
    if found != wanted:
        raise ZqError(
            f"the saved groups have {_list(found)} parameters, this optimizer's {_list(wanted)}; load it "
            "into an optimizer of the same model and groups"
        )
    for i, group in enumerate(saved["param_groups"]):
        where = f"saved group {i}: "
        if missing := sorted(needed - set(group)):
            raise ZqError(f"{where}there is no {', '.join(missing)}; it is of another optimizer than {kind}")
        options(group, where)


def _is_document(saved: Any) -> bool:
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
        return False
    groups = saved.get("param_groups")
    return isinstance(groups, Sequence) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), Sequence) for group in groups
    )


def loaded(param: Tensor, saved: Any, names: tuple[str, ...], how: States) -> dict[str, Any]:
    """The state of a parameter as it was saved: "step" and those of `names`. Raises ZqError when it does not
    fit the parameter."""
    where = f"the saved state of a parameter of shape {list(param.shape)}"
    if not isinstance(saved, Mapping):
        raise ZqError(f"{where} is {saved!r}, no mapping; load another file")
    found: dict[str, Any] = {
        name: _unpacked(param, saved[name], how, f"{where}: '{name}'")
        for name in names
        if saved.get(name) is not None
    }
    # torch's SGD counts no steps, and has no momentum at first.
    missing = [name for name in ("step", *names) if saved.get(name) is None]
    if missing and "exp_avg" in names:
        raise ZqError(f"{where} has no {', '.join(missing)}; it is of another optimizer, or damaged")
    step = _step(saved, where) if "step" in saved else torch.tensor(1.0 if found else 0.0)
    return {"step": step, **found}


def _unpacked(param: Tensor, value: Any, how: States, where: str) -> State:
    if isinstance(value, Tensor):
        _fits(value.shape, param, where)
        if not value.is_floating_point():
            raise ZqError(
                f"{where} is {str(value.dtype).removeprefix('torch.')}, no float; load another file"
            )
        full = Full(param)
        full.values.copy_(value)
        return full
    if not isinstance(value, Mapping) or not {"spec", "shape"} <= set(value):
        raise ZqError(f"{where} is neither a tensor nor codes with a spec and a shape; load another file")
    _fits(value["shape"], param, where)
    state = new(param, checked(value["spec"], where), how)
    assert isinstance(state, Quantized | Factored)
    for name, tensor in state.tensors().items():
        found = value.get(name)
        if not isinstance(found, Tensor) or found.shape != tensor.shape or found.dtype != tensor.dtype:
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else f"{found!r}"
            raise ZqError(
                f"{where}, {value['spec']}: '{name}' is {got}, not {tensor.dtype} {list(tensor.shape)}; "
                "the file is damaged or of another version"
            )
        tensor.copy_(found)
    return state


def _step(saved: Mapping[str, Any], where: str) -> Tensor:
    value = saved["step"]
    number = float(value) if is_number(value) else math.nan
    if not (math.isfinite(number) and number >= 0 and number == int(number)):
        raise ZqError(f"{where} has step {value!r}; allowed: a whole number from 0")
    return torch.tensor(number)


def _fits(found: Sequence[int], param: Tensor, where: str) -> None:
    if tuple(found) != tuple(param.shape):
        raise ZqError(
            f"{where} has shape {list(found)}, its parameter {list(param.shape)}; load another file"
        )


def _list(numbers: list[int]) -> str:
    return " + ".join(map(str, numbers)) or "no"
