"""The estimate grows with what a recipe asks for."""

from __future__ import annotations

from pathlib import Path

from tests.quantizers.blocks import recipe
from tests.tiny import save_tiny
from zq.estimate import _tries, estimate
from zq.plan import make_plan

RULE = "{match: '*', weights: 'int4:g32', activations: 'int8:token'}"


def test_a_search_for_scales_is_counted(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    steps = ("", "{smoothquant: {}}, ", "{smoothquant: {search: true, windows: 2}}, ", "{awq: {}}, ")
    plans = [make_plan(tmp_path, recipe(RULE, f"{first}{{rtn: {{}}}}")) for first in steps]
    assert [_tries(plan) for plan in plans] == [0, 0, 11 * 2 / 8, 20]
    seconds = [estimate(plan)["seconds"] for plan in plans]
    memory = [estimate(plan)["memory"] for plan in plans]
    assert seconds[3] >= seconds[0]
    assert memory[0] < memory[1] == memory[3]
