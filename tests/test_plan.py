"""What a plan says about its recipe: rules that never apply, and where each one was written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny
from zq.errors import ZqError
from zq.plan import make_plan
from zq.recipe import load

ALL = "  - {match: '*', weights: 'int8:channel'}\n"
MLP = "  - {match: '@mlp', weights: 'int4:g32'}\n"
ATTENTION = "  - {match: '@attention', weights: 'int4:g32'}\n"
HEAD = "  - {match: lm_head, weights: 'int8:channel'}\n"
FREE = "calibration: {source: none}\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-tied")
    save_tiny("llama-tied", folder)
    return folder


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    return lambda name, text: Path(name).write_text(text + FREE)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            ALL + MLP,
            "r.yaml:3: rule '@mlp' never applies, every layer that it matches is taken by '*' (r.yaml:2)",
        ),
        (
            MLP + ATTENTION + ALL,
            "r.yaml:4: rule '*' never applies, every layer that it matches is taken by "
            "'@attention' (r.yaml:3), '@mlp' (r.yaml:2)",
        ),
        (ALL + "  - {match: '*.c_fc', skip: true}\n", "r.yaml:3: rule '*.c_fc' matches no linear layer"),
        (ALL + HEAD, "r.yaml:3: 'lm_head' shares its weight with model.embed_tokens.weight"),
        ("  - {match: '*', skip: true}\n", "r.yaml quantizes nothing"),
    ],
)
def test_a_rule_that_never_applies_is_named_with_its_line(
    rules: str, message: str, source: Path, write
) -> None:
    write("r.yaml", f"rules:\n{rules}")
    with pytest.raises(ZqError, match="^" + re.escape(message)):
        make_plan(source, load("r.yaml"))


def test_an_inherited_rule_that_never_applies_is_a_note(source: Path, write) -> None:
    write("base.yaml", f"rules:\n{MLP}  - {{match: '*.c_fc', skip: true}}\n{ATTENTION}")
    write("child.yaml", f"extends: base.yaml\nrules:\n{ALL}")
    notes = make_plan(source, load("child.yaml")).notes
    taken = "every layer that it matches is taken by '*' (child.yaml:3)"
    assert f"base.yaml:2: rule '@mlp' never applies, {taken}" in notes
    assert "base.yaml:3: rule '*.c_fc' matches no linear layer of this model" in notes
    assert f"base.yaml:4: rule '@attention' never applies, {taken}" in notes


def test_an_inherited_tied_head_names_its_own_line(source: Path, write) -> None:
    write("base.yaml", f"\n\nrules:\n{ALL}{HEAD}")
    write("child.yaml", "extends: base.yaml\n")
    with pytest.raises(ZqError, match=r"^base\.yaml:5: 'lm_head' shares its weight"):
        make_plan(source, load("child.yaml"))


@pytest.mark.parametrize("everything", ["*", "re:.+", "?*", "***"])
def test_a_catch_all_leaves_the_head_alone(everything: str, tmp_path: Path, write) -> None:
    save_tiny("llama", tmp_path / "m")
    write("r.yaml", f"rules:\n  - {{match: '{everything}', weights: 'int8:channel'}}\n")
    plan = make_plan(tmp_path / "m", load("r.yaml"))
    assert len(plan.assigned) == 14
    assert "lm_head" not in plan.assigned


def test_the_size_before_counts_what_the_model_does_not_use(tmp_path: Path, write) -> None:
    save_tiny("llama", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors, file, {"format": "pt"})
    write("r.yaml", f"rules:\n{ALL}")
    assert make_plan(tmp_path / "m", load("r.yaml")).bytes_before == sum(t.nbytes for t in tensors.values())
