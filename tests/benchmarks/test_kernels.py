"""benchmarks/kernels.py, as far as it goes without a GPU: what is counted, and the tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import kernel_rows
import kernel_tables
import pages
import pytest
import torch

from tests.command import ENVIRONMENT

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernel_rows, "ROTATED", 1 << 15)
    monkeypatch.setattr(kernel_rows, "WIDTHS", (64,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


def test_activations(small):
    rows = list(kernel_rows.activation_rows([4], "cpu"))
    assert [row.kernel for row in rows][:3] == ["copy", "quant_int8", "quant_fp8"]
    for row in rows:
        assert (
            row.bytes == {"copy": 4, "silu_mul_quant": 5, "add_rms_norm_quant": 5}.get(row.kernel, 3) * 4 * 64
        )
        calls = row.make(row.copies)
        assert len(calls) * row.operands >= kernel_rows.ROTATED
        outputs = [call() for call in calls[:2]]
        assert len(outputs) == 2


def test_products_run_and_count(small):
    rows = list(kernel_rows.product_rows([32], 128, 256, "cpu", 90))
    names = [row.kernel for row in rows]
    assert names[:2] == ["cuBLAS bf16", "cuBLAS int8, int32 out"]
    assert sum(name.startswith("zq ") for name in names) == len(kernel_rows.MEASURED)
    for row in rows:
        assert row.operations == 2 * 32 * 128 * 256
        call = row.make(1)[0]
        assert call().shape == (32, 128)
    by_name = {row.kernel: row for row in rows}
    assert by_name["cuBLAS bf16"].bytes == 2 * (128 * 256 + 32 * 256 + 32 * 128)
    assert by_name["zq W8A8-INT8"].bytes == 128 * 256 + 32 * 256 + 2 * 32 * 128
    four = by_name["zq W4A8-INT8 g128 two-level"].operands / (128 * 256) * 8
    assert 4.0 < four <= 4.25
    assert not any("fp8" in row.kernel.lower() for row in kernel_rows.product_rows([32], 128, 256, "cpu", 80))


def test_calls_have_operands_of_their_own():
    seen = []
    make = kernel_rows._rotate(torch.ones(4), lambda x: seen.append(x.data_ptr()))
    for call in make(5):
        call()
    assert len(set(seen)) == 5


def row(table, kernel, m, n, k, us, bytes_=0, operations=0):
    sizes = {"m": m, "n": n, "k": k}
    times = {"us": us, "sustained_us": 1.5 * us}
    return {"table": table, "kernel": kernel, **times, "bytes": bytes_, "operations": operations} | sizes


DOCUMENT = {
    "environment": {"device": "a GPU", "torch": "2.11", "nvrtc": "13.0"},
    "commit": "abc",
    "rows": [
        row("ceiling", "bare wgmma u8 x s8, N = 128", 0, 128, 0, 10.0, 0, 19_000_000_000),
        row("ceiling", "bare wgmma u8 x s8, N = 256", 0, 256, 0, 10.0, 0, 18_000_000_000),
        row("activations", "copy", 8, 0, 64, 2.0, 4000),
        row("activations", "quant_int8", 8, 0, 64, 2.0, 3000),
        row("products", "cuBLAS bf16", 1, 128, 256, 5.0, 1000, 2000),
        row("products", "cuBLAS bf16", 64, 128, 256, 6.0, 1000, 90000),
        row("products", "zq W8A8-INT8", 64, 128, 256, 3.0, 1000, 90000),
    ],
}


def test_tables():
    text = pages.all_tables(DOCUMENT)
    assert "| cuBLAS bf16 | 5.0 | 6.0 |" in text
    assert "| zq W8A8-INT8 | – | 3.0 (2.00x) |" in text
    assert "| copy | 2.0 (100 %) |" in text
    assert "| quant_int8 | 2.0 (75 %) |" in text
    assert "| bare wgmma u8 x s8, N = 128 | 1900 |" in text
    assert text.count("commit abc") == 3
    memory, flat = kernel_tables.roofs(DOCUMENT)
    assert memory == pytest.approx(2e9)
    assert flat == {"bare wgmma u8 x s8": pytest.approx(1.9e15)}


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    kernel_tables.plot(DOCUMENT, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_the_script(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(DOCUMENT))
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(
        [*command, "--markdown", str(path)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout.strip() == pages.all_tables(DOCUMENT).strip()
    if not torch.cuda.is_available():
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert "torch sees none" in done.stderr
