from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from zq.checkpoint.prefetch import Prefetch
from zq.errors import ZqError


class Source:
    """Tensors by name, who read them in which thread, and a gate that holds back other threads' reads."""

    def __init__(self) -> None:
        self.reads: list[tuple[bool, list[str]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        main = threading.current_thread() is threading.main_thread()
        if not main:
            assert self.gate.wait(10)
        self.reads.append((main, names))
        if "bad" in names:
            raise ZqError("holds no tensor 'bad'")
        return {name: torch.tensor([float(ord(name))]) for name in names}


def test_without_expectations_it_reads_what_is_asked_for() -> None:
    source = Source()
    assert Prefetch(source)(name for name in "ab").keys() == {"a", "b"}
    assert source.reads == [(True, ["a", "b"])]


def test_expected_tensors_are_read_once_in_a_thread_and_handed_out_once() -> None:
    source = Source()
    read = Prefetch(source)
    source.gate.clear()
    read.expect(["b", "a"])
    assert read(["x"])["x"] == ord("x")  # does not wait for the thread
    source.gate.set()
    first = read(["a", "c"])
    assert {name: float(value) for name, value in first.items()} == {"a": 97.0, "c": 99.0}
    assert float(read(["b"])["b"]) == 98.0
    assert float(read(["a"])["a"]) == 97.0
    assert source.reads == [(True, ["x"]), (False, ["a", "b"]), (True, ["c"]), (True, ["a"])]


def test_a_new_expectation_replaces_the_old_one() -> None:
    source = Source()
    read = Prefetch(source)
    read.expect(["a"])
    read.expect([])
    assert float(read(["a"])["a"]) == 97.0
    assert (True, ["a"]) in source.reads


def test_an_error_of_the_thread_is_raised_where_its_tensor_is_asked_for() -> None:
    read = Prefetch(Source())
    read.expect(["bad"])
    assert read(["a"]).keys() == {"a"}
    with pytest.raises(ZqError, match="holds no tensor 'bad'"):
        read(["bad"])
