"""What every command shares."""

from __future__ import annotations

import json
import math

import pytest

from zq.cli import console
from zq.cli.console import check_number, listing, print_json, size, torch_device
from zq.errors import ZqError


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (113_100_000, "113.1 MB"),
        (2.5e9, "2.5 GB"),
        (3e12, "3.00 TB"),
    ],
)
def test_size(count, text):
    assert size(count) == text


def test_json_is_strict_and_keeps_letters(capsys):
    print_json({"a": [math.nan, math.inf, 1.5], "b": (-math.inf, "ü"), "c": {"d": None, "e": True}})
    text = capsys.readouterr().out
    assert "ü" in text
    assert json.loads(text) == {"a": [None, None, 1.5], "b": [None, "ü"], "c": {"d": None, "e": True}}


@pytest.mark.parametrize("value", [0.5, 2.5, math.nan, math.inf, -math.inf, -1, 10**400])
def test_numbers_out_of_range(value):
    with pytest.raises(ZqError, match=r"^--x .* is not allowed; give from 1 to 2$"):
        check_number("--x", value, 1, 2)


def test_numbers_in_range():
    check_number("--x", 1, 1, 2)
    check_number("--x", 2, 1, 2)
    check_number("--x", 10**300, 1)
    with pytest.raises(ZqError, match="give 1 or more"):
        check_number("--x", math.inf, 1)


def test_a_listing_shortens_nothing(capsys, monkeypatch):
    monkeypatch.setattr(console.out, "width", 20)
    listing(("name", "what"), [("model.layers.0.self_attn.q_proj", "[red]int8[/]"), ("b", "c")])
    width = len("model.layers.0.self_attn.q_proj")
    assert capsys.readouterr().out.splitlines() == [
        "name".ljust(width) + "  what",
        "model.layers.0.self_attn.q_proj  [red]int8[/]",
        "b".ljust(width) + "  c",
    ]


def test_devices():
    assert torch_device("cpu") == "cpu"
    assert torch_device("auto") in ("cpu", "cuda")
    for name in ("", "tpu", "meta", "cpu:1", "cuda:x", "cuda:-1", "mps"):
        with pytest.raises(ZqError, match="allowed: auto, cpu, cuda, cuda:N"):
            torch_device(name)
