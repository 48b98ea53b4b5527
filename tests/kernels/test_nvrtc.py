"""Every kernel compiles without a GPU, and what a cubin depends on is in its key."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kernels.conftest import ARCHS, chosen, resources
from zq.errors import ZqError
from zq.kernels import nvrtc
from zq.kernels.table import QUANT_UNITS, UNITS
from zq.kernels.table_kv import KV_UNITS
from zq.kernels.table_optim import OPTIM_UNITS
from zq.kernels.unit import ARCHS as ALL
from zq.kernels.unit import Unit, arch_number, arch_of, parse_archs

UNIT = UNITS["plain_int8_bf16"]
QUANTS = {unit.name for unit in (*QUANT_UNITS, *KV_UNITS)}
OPTIMS = {unit.name for unit in OPTIM_UNITS}


@pytest.mark.parametrize(("name", "arch"), chosen())
def test_compiles(name, arch, compiled):
    made = compiled[name, arch]
    assert isinstance(made, nvrtc.Compiled), made
    assert made.cubin.startswith(b"\x7fELF")
    for entry in UNITS[name].entries:
        assert f".text.{entry}".encode() in made.cubin
    assert set(resources(made.log)) == set(UNITS[name].entries)
    assert "warning" not in made.log
    assert "serialized" not in made.log  # products that wait for each other


THREADS = {"quantize_4": 896, "store_kv_256": 640, "store_rows_64": 896, "store_rows_128": 896}


@pytest.mark.parametrize(("name", "arch"), [pair for pair in chosen() if pair[0] in QUANTS])
def test_a_row_stays_in_registers(name, arch, compiled):
    threads_of = {"quant.cu": 1024, "store_kv.cu": 1024, "attention.cu": 256, "token.cu": 256, "text.cu": 256}
    usual = threads_of[UNITS[name].source]  # with a neighbour
    for entry, (registers, spills) in resources(compiled[name, arch].log).items():
        threads = THREADS.get(entry, usual)
        assert registers <= min(65536 // threads, 255)
        assert spills == 0


@pytest.mark.parametrize(("name", "arch"), [pair for pair in chosen() if pair[0] in OPTIMS])
def test_a_step_stays_in_registers(name, arch, compiled):
    found = resources(compiled[name, arch].log)
    assert found["step"][0] <= 64, "four blocks of 256 threads on a multiprocessor"
    assert {spills for _, spills in found.values()} == {0}


def test_every_architecture_is_compiled_for():
    assert {arch for _, arch in chosen()} == set(ARCHS)
    assert {name for name, _ in chosen()} >= QUANTS | OPTIMS
    assert {UNITS[name].source for name, _ in chosen()} == {unit.source for unit in UNITS.values()}


def test_the_same_source_gives_the_same_bytes():
    pytest.importorskip("cuda.bindings.nvrtc")
    assert nvrtc.compile_unit(UNIT, "sm_90a").cubin == nvrtc.compile_unit(UNIT, "sm_90a").cubin


def test_compiling_changes_no_object_of_python():
    """The log of a quiet compilation is one byte; written into a bytes object of length 1, it would change
    all."""
    pytest.importorskip("cuda.bindings.nvrtc")
    nvrtc.compile_unit(UNIT, "sm_90a")
    assert [bytes([i])[0] for i in range(256)] == list(range(256))
    assert bytes([32]) == b" "
    assert b" ".decode() == chr(32)


def test_the_key_has_all_that_a_cubin_depends_on(monkeypatch):
    keys = {
        nvrtc.key(UNIT, "sm_90a", "13.0"),
        nvrtc.key(UNIT, "sm_80", "13.0"),
        nvrtc.key(UNIT, "sm_90a", "13.5"),
    }
    keys.add(nvrtc.key(replace(UNIT, defines=(*UNIT.defines, ("MORE", "1"))), "sm_90a", "13.0"))
    keys.add(nvrtc.key(replace(UNIT, options=("--use_fast_math",)), "sm_90a", "13.0"))
    texts = nvrtc.texts(UNIT.source)
    assert set(texts) == {
        f"{name}.cuh"
        for name in ("before", "row", "piece", "codes8", "quotient", "round8", "floats", "common")
    } | {"quant.cu"}
    for name in texts:
        changed = texts | {name: texts[name] + "\n"}
        monkeypatch.setattr(nvrtc, "texts", lambda source, changed=changed: changed)
        keys.add(nvrtc.key(UNIT, "sm_90a", "13.0"))
    assert len(keys) == 14
    monkeypatch.undo()
    assert nvrtc.key(replace(UNIT, name="other", ops=()), "sm_90a", "13.0") in keys


def test_an_error_is_its_first_line():
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(nvrtc.CompileError) as raised:
        nvrtc.compile_unit(replace(UNIT, defines=(("OP", "Nothing"),)), "sm_90a")
    assert "kernel plain_int8_bf16 does not compile for sm_90a" in str(raised.value)
    assert "quant.cu(" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.log.count("error") > 1


def test_a_unit_for_other_devices():
    with pytest.raises(ZqError, match="plain_fp8_bf16 is not for sm_80; it is for sm_89, sm_90a"):
        nvrtc.compile_unit(UNITS["plain_fp8_bf16"], "sm_80")


def test_a_source_that_is_missing():
    with pytest.raises(ZqError, match=r"kernel source .*nothing\.cu cannot be read"):
        nvrtc.texts("nothing.cu")


def test_architectures():
    assert parse_archs("sm_90a, sm_80,sm_90a") == ("sm_90a", "sm_80")
    assert parse_archs("all") == ALL
    assert [arch_number(arch) for arch in ALL] == [80, 89, 90, 100, 120]
    assert {arch_of(c) for c in ((8, 0), (8, 6), (9, 0), (12, 1))} == {"sm_80", "sm_90a", "sm_120"}
    with pytest.raises(ZqError, match=r"compute capability 7\.5; supported are 8\.0, 8\.6"):
        arch_of((7, 5))
    with pytest.raises(ZqError, match="'sm_90' is unknown; allowed: sm_80"):
        parse_archs("sm_90")


def test_the_table():
    for unit in UNITS.values():
        assert isinstance(unit, Unit)
        assert set(unit.archs) <= set(ALL)
        assert unit.entries
        assert (nvrtc.SOURCES / unit.source).is_file()
    # "-D" of one unit must tell it from all others of its source
    made = [(unit.source, unit.defines, unit.options) for unit in UNITS.values()]
    assert len(set(made)) == len(made)
    sources = {path.name for path in nvrtc.SOURCES.glob("*.cu") if not path.name.startswith("bench_")}
    assert sources == {unit.source for unit in UNITS.values()}
