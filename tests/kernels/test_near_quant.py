"""The judge of codes behind a norm or an activation function (near_quant.py): what it lets through."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.inputs import FP8, quant_calls
from tests.kernels.near_quant import EXACT, verdict
from zq.kernels import reference


@pytest.fixture(params=[case for case in quant_calls(4, 256) if case[0] not in EXACT], ids=lambda c: c[0])
def case(request):
    name, args = request.param
    wanted = list(getattr(reference, name)(*args))
    return name, args, wanted, [each.clone() for each in wanted]


def test_the_reference_is_right(case):
    name, args, wanted, made = case
    assert verdict(name, args, made, wanted) == ""


def test_a_wrong_code_is_found(case):
    name, args, wanted, made = case
    column = int(wanted[0][3].double().abs().argmin())
    if made[0].dtype == FP8:
        made[0][3, column] = 1.0 - float(wanted[0][3, column])
    else:
        made[0][3, column] += 2
        made[2] += torch.tensor([0, 0, 0, 2], dtype=torch.int32)
    assert "codes are wrong" in verdict(name, args, made, wanted)


def test_a_wrong_scale_sum_or_residual_is_found(case):
    name, args, wanted, made = case
    made[1] *= 1.1
    assert "wrong" in verdict(name, args, made, wanted)
    made[1].copy_(wanted[1])
    for more, what in zip(made[2:], ("a sum", "x \\+ residual|norm"), strict=False):
        if more.numel():
            more[3] += 1
            assert "is wrong" in verdict(name, args, made, wanted), what
            more[3] -= 1


def test_codes_that_differ_often_are_found():
    """Each within rounding, but all on the same side."""
    x = torch.full((1, 4096), 0.671875, dtype=torch.bfloat16)  # gelu: a bit more than 0.5
    x[0, 0] = 127.5  # a scale of 1
    args = (x, "none", torch.int8)
    wanted = list(reference.gelu_quant(*args))
    assert wanted[0][0, 1:].eq(1).all()
    made = [wanted[0].clone(), wanted[1], wanted[2] - 4095]
    made[0][0, 1:] = 0
    assert "of the codes differ" in verdict("gelu_quant", args, made, wanted)
