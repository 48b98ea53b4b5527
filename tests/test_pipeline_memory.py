"""Peak memory must not grow with depth: one block is in memory, however many there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.simulate import recipe

HIDDEN, INNER = 512, 1024

MEASURED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.recipe import Recipe
source, out, text = sys.argv[1:]
quantize(make_plan(Path(source), Recipe.parse(text)), Path(out))
# Not ru_maxrss: a process inherits that from the one that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def write_llama(folder: Path, blocks: int) -> int:
    """A random bf16 Llama of this depth; the bytes of its file."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        if len(shape) > 1
        else torch.ones(shape).bfloat16()
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_at_4_and_at_40_blocks(tmp_path: Path) -> None:
    text = str(recipe("* = int4:g64 @ int8:token", scale="absmax"))
    peaks, sizes = [], []
    for blocks in (4, 40):
        sizes.append(write_llama(tmp_path / f"in{blocks}", blocks))
        out = tmp_path / f"out{blocks}"
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(tmp_path / f"in{blocks}"), str(out), text],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split()[-1]) * 1024)
        report = json.loads((out / "zq_report.json").read_text())
        assert len(report["layers"]) == 7 * blocks
    assert sizes[1] > 8 * sizes[0]
    grown = peaks[1] - peaks[0]
    assert grown < 60e6, f"{grown / 1e6:.0f} MB more for {(sizes[1] - sizes[0]) / 1e6:.0f} MB more of model"
