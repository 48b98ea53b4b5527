"""zq kernels, and zq quantize --kernels."""

from __future__ import annotations

import json

import pytest

from tests.command import run
from zq.kernels import cache as cubin_cache
from zq.kernels import nvrtc, table

FEW = ("plain_int8_bf16", "plain_fp8_bf16", "silumul_int8_bf16")


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture
def few(monkeypatch, cubins):
    """A table of three kernels and a cache of their own."""
    pytest.importorskip("cuda.bindings.nvrtc")
    chosen = {name: table.UNITS[name] for name in FEW}
    monkeypatch.setattr(table, "UNITS", chosen)
    monkeypatch.setattr("zq.kernels.select.UNITS", chosen)
    monkeypatch.setenv("ZQ_CACHE", str(cubins))
    return chosen


def test_build(few, tmp_path, cubins):
    done = run("kernels", "build", "--arch", "sm_80,sm_90a", "-o", tmp_path / "out").ok()
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {f"{name}.sm_90a.cubin" for name in FEW} | {
        f"{name}.sm_80.cubin" for name in FEW if "fp8" not in name
    }
    assert len([line for line in done.err.splitlines() if "/5  sm_" in line]) == 5
    assert "ETA 0 s" in done.err
    assert done.out.startswith("5 cubins, ")
    assert len(list((cubins / "kernels").glob("*.cubin"))) == 5
    again = run("kernels", "build", "--arch", "sm_90a", "--json").ok().json
    assert again["cubins"] == 3
    assert again["output"] == str(cubins / "kernels")
    for name in FEW:
        data = cubin_cache.place(few[name], "sm_90a").read_bytes()
        assert (tmp_path / "out" / f"{name}.sm_90a.cubin").read_bytes() == data


def test_list(few):
    run("kernels", "build", "--arch", "sm_80").ok()
    listed = run("kernels", "list", "--json").ok().json
    assert listed["nvrtc"] == nvrtc.version()
    rows = {row["kernel"]: row for row in listed["kernels"]}
    assert set(rows) == set(FEW)
    assert "sm_80" in rows["plain_int8_bf16"]["compiled"]
    assert "sm_120" not in rows["plain_int8_bf16"]["compiled"]
    assert rows["plain_fp8_bf16"]["operators"] == ["quant_fp8"]
    assert run("kernels").ok().out == run("kernels", "list").ok().out
    assert "quant_int8" in run("kernels").ok().out


def test_list_without_a_compiler(few, monkeypatch):
    monkeypatch.setattr(nvrtc, "is_installed", lambda: False)
    assert "NVRTC is not installed; run: pip install 'zq[kernels]'" in run("kernels", "list").ok().out
    assert run("kernels", "list", "--json").ok().json["nvrtc"] is None


def test_bundle(few, w4a8, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(w4a8, out)
    said = run("kernels", "bundle", out, "--arch", "sm_90a,sm_80", "--json").ok().json
    manifest = json.loads((out / "kernels" / "manifest.json").read_text())
    made = {(entry["unit"], entry["arch"]) for entry in manifest["cubins"]}
    archs = {name: table.UNITS[name].archs for name in FEW}  # FP8: for a cache
    assert made == {(name, arch) for name in FEW for arch in ("sm_80", "sm_90a") if arch in archs[name]}
    assert said["cubins"] == len(made)
    run("inspect", out, "--audit").ok()
    run("generate", out, "a", "--max-tokens", "2").ok()


def test_quantize_with_kernels(few, llama, tmp_path):
    out = tmp_path / "out"
    args = ("quantize", llama, "--w8a8", "--calib", "random", "-o", out, "--kernels", "sm_90a")
    assert not run(*args, "--dry-run").ok().err.count("sm_90a")
    done = run(*args).ok()
    assert "3 cubins for sm_90a" in done.out
    assert {path.name for path in (out / "kernels").iterdir()} == {
        "manifest.json",
        "src",
        *(f"{name}.sm_90a.cubin" for name in FEW),
    }
    run("inspect", out, "--audit").ok()
    plain = tmp_path / "plain"
    run("quantize", llama, "--w8a8", "--calib", "random", "-o", plain).ok()
    assert (plain / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert not (plain / "kernels").exists()


def test_quantize_says_at_once_that_a_kernel_does_not_compile(few, llama, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise nvrtc.CompileError("kernel x does not compile", "log")

    monkeypatch.setenv("ZQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "compile_unit", fail)
    done = run(
        "quantize", llama, "--w8a8", "--calib", "random", "-o", tmp_path / "out", "--kernels", "sm_90a"
    )
    assert done.code == 2
    assert "does not compile; the whole log is in" in done.err
    assert not (tmp_path / "out").exists()
