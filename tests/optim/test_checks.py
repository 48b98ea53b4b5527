"""What cannot be is refused in one line, and nothing has changed then."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from zq.errors import ZqError
from zq.optim import SGD, AdamW

TORCHS = ("amsgrad", "maximize", "foreach", "capturable", "differentiable")


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape or (96, 96)).to(dtype))
    param.grad = torch.randn(shape or (96, 96)).to(dtype)
    return param


def saved(bits: int, optimizer: Any = AdamW, **options: Any) -> dict[str, Any]:
    made = optimizer([parameter()], bits=bits, **options)
    made.step()
    return copy.deepcopy(made.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"betas": 0.9}, "two numbers from 0 to below 1"),
        ({"betas": (0.9,)}, "two numbers from 0 to below 1"),
        ({"betas": ("a", "b")}, "two numbers from 0 to below 1"),
        ({"lr": "1e-3"}, "lr='1e-3' is not allowed; allowed: a number from 0"),
        ({"lr": float("inf")}, "lr=inf is not allowed"),
        ({"lr": torch.ones(2)}, "is not allowed; allowed: a number from 0"),
        ({"lr": None}, "lr=None is not allowed"),
        ({"weight_decay": True}, "weight_decay=True is not allowed"),
        ({"bits": 8.0}, "bits=8.0 is not allowed; allowed: 32, 8, 4"),
        ({"fused": "yes"}, "fused='yes' is not allowed; allowed: None, True, False"),
        ({"maximize": "yes"}, "maximize='yes' is not allowed; allowed: True, False"),
        ({"foreach": 3}, "foreach=3 is not allowed; allowed: True, False"),
        ({"capturable": True}, "capturable=True is not possible: a step of zq cannot be captured"),
        ({"differentiable": True}, "no gradient passes through a step of zq; give differentiable=False"),
    ],
)
def test_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ZqError) as caught:
        AdamW([parameter()], **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"lr": -5}, "lr=-5 is not allowed"),
        ({"betas": (2, 3)}, "betas=(2, 3) is not allowed"),
        ({"amsgrad": True}, "amsgrad=True is not possible: zq's optimizers keep no maximum of the second"),
    ],
)
def test_options_of_a_group(group: dict[str, Any], words: str) -> None:
    with pytest.raises(ZqError) as caught:
        AdamW([{"params": [parameter()], **group}])
    assert words in str(caught.value)


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_dtypes_that_lose_something(bits: int, dtype: torch.dtype) -> None:
    for kind in (AdamW, SGD):
        param = parameter(dtype=dtype)
        before = param.detach().clone()
        with pytest.raises(ZqError, match="allowed: float32, bfloat16, float16, float64"):
            kind([param], lr=0.1, bits=bits).step()
        assert torch.equal(param.detach().view(torch.uint8), before.view(torch.uint8))


def change(state: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["state"][0][state].update(values)


CODES = torch.zeros(1, dtype=torch.int32)
DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no second moment": (lambda d: d["state"][0].pop("exp_avg_sq"), "has no exp_avg_sq"),
    "no step": (lambda d: d["state"][0].pop("step"), "has no step"),
    "step NaN": (lambda d: d["state"][0].update(step=torch.tensor(float("nan"))), "a whole number from 0"),
    "step negative": (lambda d: d["state"][0].update(step=-5), "has step -5"),
    "step text": (lambda d: d["state"][0].update(step="x"), "has step 'x'"),
    "a number": (lambda d: d["state"][0].update(exp_avg=3), "neither a tensor nor codes"),
    "no mapping": (lambda d: d["state"].update({0: 7}), "is 7, no mapping"),
    "no spec": (lambda d: d["state"][0]["exp_avg"].pop("spec"), "neither a tensor nor codes"),
    "spec unknown": (change("exp_avg", spec="foo"), "spec 'foo', which no state can have"),
    "spec of weights": (change("exp_avg", spec="int4:g64"), "spec 'int4:g64', which no state can have"),
    "another spec": (change("exp_avg", spec="dynamic4:b128"), "'codes' is torch.int32 [2304], not"),
    "no codes": (lambda d: d["state"][0]["exp_avg"].pop("codes"), "'codes' is None"),
    "codes that would be broadcast": (change("exp_avg", codes=CODES), "'codes' is torch.int32 [1], not"),
    "codes in floats": (change("exp_avg", codes=torch.zeros(2304)), "'codes' is torch.float32 [2304], not"),
    "two groups": (lambda d: d["param_groups"].append(d["param_groups"][0]), "groups have 1 + 1 parameters"),
    "two parameters": (lambda d: d["param_groups"][0]["params"].append(1), "groups have 2 parameters"),
    "no groups": (lambda d: d.pop("param_groups"), "is no state_dict of an optimizer"),
    "no mapping of states": (lambda d: d.update(state=[]), "is no state_dict of an optimizer"),
    "a number of groups": (lambda d: d.update(param_groups=1), "is no state_dict of an optimizer"),
    "a number as a group": (lambda d: d.update(param_groups=[0]), "is no state_dict of an optimizer"),
    "a group of nothing": (lambda d: d["param_groups"][0].pop("params"), "is no state_dict of an optimizer"),
    "no betas": (lambda d: d["param_groups"][0].pop("betas"), "saved group 0: there is no betas"),
    "a rate below 0": (lambda d: d["param_groups"][0].update(lr=-1), "saved group 0: lr=-1"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_changes_nothing(name: str) -> None:
    damage, words = DAMAGED[name]
    document = saved(8)
    damage(document)
    optimizer = AdamW([parameter()], lr=0.25, bits=8)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ZqError) as caught:
        optimizer.load_state_dict(document)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"]["codes"], before["state"][0]["exp_avg"]["codes"])
    optimizer.step()


def test_files_of_other_optimizers() -> None:
    with pytest.raises(ZqError, match="there is no betas, eps; it is of another optimizer than AdamW"):
        AdamW([parameter()]).load_state_dict(saved(8, SGD, momentum=0.9))
    with pytest.raises(ZqError, match="of another optimizer than SGD"):
        SGD([parameter()]).load_state_dict(saved(8))
    theirs = torch.optim.AdamW([parameter()], amsgrad=True)
    theirs.step()
    with pytest.raises(ZqError, match="saved group 0: amsgrad=True"):
        AdamW([parameter()], bits=8).load_state_dict(theirs.state_dict())
    adam = torch.optim.Adam([parameter()], weight_decay=0.1)
    adam.step()
    with pytest.raises(ZqError, match="weight decay there is part of the gradient"):
        AdamW([parameter()], bits=8).load_state_dict(adam.state_dict())


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize(
    ("kind", "places", "more"),
    [
        (AdamW, (0.1, (0.9, 0.99), 1e-8, 0.1, False), {"capturable": False}),
        (SGD, (0.1, 0.9, 0.0, 0.1, True), {}),
    ],
)
def test_torchs_own_arguments(kind: Any, places: tuple[Any, ...], more: dict[str, Any], bits: int) -> None:
    """By place and by name; `foreach` changes nothing."""
    found = []
    for foreach in (None, True, False):
        named = {"maximize": False, "foreach": foreach, "differentiable": False, "fused": None, **more}
        theirs = getattr(torch.optim, kind.__name__)([parameter()], *places, **named)
        ours = kind([parameter()], *places, **named, bits=bits)
        wanted = theirs.state_dict()["param_groups"][0]
        for name in ("fused", "decoupled_weight_decay"):  # of the optimizer; always so
            wanted.pop(name, None)
        assert ours.state_dict()["param_groups"] == [wanted]
        ours.step()
        found.append(ours.param_groups[0]["params"][0].detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_how_to_compute_a_step_is_not_taken_from_a_file(bits: int) -> None:
    document = saved(32)
    for group in document["param_groups"]:
        group |= {"capturable": True, "differentiable": True, "foreach": True}
    ours = AdamW([parameter()], bits=bits, foreach=False)
    ours.load_state_dict(document)
    assert [ours.param_groups[0][name] for name in ("capturable", "foreach")] == [False, False]
    ours.step()


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_file_without_torchs_options(bits: int) -> None:
    """As older versions wrote it: the options stay as they are, in every group."""
    both = [{"params": [parameter()]}, {"params": [parameter()], "maximize": True}]
    ours = AdamW(both, bits=bits)
    document = copy.deepcopy(ours.state_dict())
    for group in document["param_groups"]:
        for name in TORCHS:
            del group[name]
    ours.load_state_dict(document)
    ours.step()
    assert [group["maximize"] for group in ours.param_groups] == [False, True]


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_pickle_without_torchs_options(kind: Any) -> None:
    """As older versions wrote it."""
    old, new = kind([parameter()], bits=8), kind([parameter()], bits=8)
    for options in (old.defaults, *old.param_groups):
        for name in TORCHS:
            options.pop(name, None)
    old = pickle.loads(pickle.dumps(old))
    ours, wanted = (each.param_groups[0]["params"][0] for each in (old, new))
    ours.grad = wanted.grad.clone()  # pickles of parameters hold none
    old.step()
    new.step()
    assert torch.equal(ours, wanted)
    old.load_state_dict(new.state_dict())
    assert old.param_groups[0]["maximize"] is False


def test_momentum_that_comes_later_begins_at_zero() -> None:
    """Also from a file of torch's SGD without momentum, which saves none."""
    theirs = torch.optim.SGD([parameter()], lr=0.1)
    theirs.step()
    ours = SGD([parameter()], lr=0.1, bits=8)
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    ours.param_groups[0]["momentum"] = 0.9
    ours.step()
    (param,) = ours.param_groups[0]["params"]
    read = ours.state[param]["momentum_buffer"].read(0, param.numel())
    assert (read - param.grad.flatten()).abs().max() < 0.02 * param.grad.abs().max()


def test_a_file_of_states_is_no_recipe(tmp_path: Any) -> None:
    file = tmp_path / "states.yaml"
    for content in (b"", b"- a\n"):
        file.write_bytes(content)
        with pytest.raises(ZqError, match="states of an optimizer are a mapping, such as"):
            AdamW([parameter()], bits=8, states=file)
    file.write_bytes(os.urandom(64) + b"\xff")
    with pytest.raises(ZqError, match="cannot read"):
        AdamW([parameter()], bits=8, states=file)
