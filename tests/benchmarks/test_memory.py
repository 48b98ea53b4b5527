"""Checkpoints written piece by piece are real ones; the extrapolation is the arithmetic that it claims."""

from __future__ import annotations

from pathlib import Path

import memory
import pytest
import torch

import zq

SHAPE = {"hidden": 64, "inner": 128, "heads": 4, "kv_heads": 2, "vocabulary": 160}


def test_a_written_checkpoint_loads(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(memory, "CHUNK", 1000)  # several pieces in a tensor
    size = memory.write_random(tmp_path / "m", SHAPE, 2)
    assert size == (tmp_path / "m" / "model.safetensors").stat().st_size
    model = zq.load(str(tmp_path / "m"))
    assert model.config.num_hidden_layers == 2
    assert model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert bool((parameter == 1).all()), name
        else:
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.1), name
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_the_parts_add_up_to_what_was_measured_at_the_same_depth(tmp_path: Path):
    memory.write_random(tmp_path / "m", SHAPE, 3)
    recipe = (
        "rules: [{match: '*', weights: 'int4:g64'}]\nsteps: [gptq: {}]\n"
        "calibration: {source: random, samples: 8, length: 16, generated: 8}\n"
    )
    found = memory.measured(tmp_path / "m", recipe, "cpu")
    assert len(found["parts"]["blocks"]) == 3
    assert sum(found["parts"]["blocks"]) + found["parts"]["once"] + found["parts"][
        "with_depth"
    ] == pytest.approx(found["seconds"], abs=0.2)


def test_extrapolation():
    parts = {"blocks": [5.0, 2.0, 4.0], "once": 10.0, "with_depth": 6.0}
    # A block takes 3 s; the first took 2 more, once; 6 s of 3 blocks are 60 of 30.
    assert memory.extrapolated(parts, 30) == (3.0, 72.0, 162.0)
    assert memory.extrapolated(parts | {"blocks": [3.0, 3.0, 3.0]}, 3) == (3.0, 16.0, 25.0)
