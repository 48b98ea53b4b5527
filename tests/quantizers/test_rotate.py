"""rotate in a run: the output is that of the rotated checkpoint, planned, audited, resumed and reloaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zq
import zq.pipeline
from tests.command import run
from tests.simulate import stop_after
from tests.test_audit import flip
from tests.tiny import save_tiny, token_ids
from zq.audit import audit, audit_folder
from zq.errors import AuditError, ZqError
from zq.numerics.metrics import tensor_hash
from zq.pipeline import quantize
from zq.plan import Plan, make_plan
from zq.recipe import Recipe

RTN = "{rtn: {}}"
INT8 = "{match: '*', weights: 'int8:channel'}"
ROTATED = "{rotate: {}}, {rtn: {}}"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def recipe(steps: str, rules: str = "{match: '*', weights: 'int4:channel'}") -> Recipe:
    return Recipe.parse(
        f"rules: [{rules}]\nsteps: [{steps}]\ncalibration: {{source: random, samples: 3, length: 16}}\n"
    )


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-tied")
    save_tiny("llama-tied", folder, torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def rotated(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the view says the checkpoint would hold, as a checkpoint."""
    folder = tmp_path_factory.mktemp("rotated")
    plan = make_plan(tied, recipe(ROTATED))
    keys = plan.skeleton.param_keys.values()
    save_file(
        {key: plan.view.read([key])[key] for key in keys}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("step", ["{rtn: {}}", "{gptq: {asymmetry: 0.5}}"])
def test_a_run_is_that_of_the_rotated_checkpoint(
    step: str, tied: Path, rotated: Path, tmp_path: Path
) -> None:
    """The streams, the teacher, the Hessians and the copies: all of them see the rotated model."""
    ours = quantize(make_plan(tied, recipe("{rotate: {}}, " + step)), tmp_path / "ours").report
    theirs = quantize(make_plan(rotated, recipe(step)), tmp_path / "theirs").report
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert ours["output_error"] == theirs["output_error"]
    assert ours["bytes_after"] == theirs["bytes_after"]
    models = [zq.load(tmp_path / out) for out in ("ours", "theirs")]
    models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval())
    with torch.no_grad():
        first, *others = [model(token_ids()).logits for model in models]
    assert all(torch.equal(first, other) for other in others)


def test_the_embedding_is_untied_knowingly(tied: Path, tmp_path: Path) -> None:
    plan, out = make_plan(tied, recipe(ROTATED)), tmp_path / "out"
    report = quantize(plan, out).report
    rows = {row["name"]: row for row in plan.rows()}
    assert rows[HEAD]["why"] == "no rule names it; takes the norm before it, rotated by R1"
    assert rows[HEAD]["bytes"] == rows[EMBEDDING]["bytes"] == 2 * 160 * 64
    assert rows[EMBEDDING]["why"] == "not a linear layer; rotated by R1"
    assert rows["model.norm.weight"]["why"] == "not a linear layer; becomes ones"
    assert rows["model.layers.0.self_attn.q_proj.bias"]["why"] == "not a linear layer"
    assert sum(row["bytes"] for row in rows.values()) == plan.bytes_after == report["bytes_after"]
    (note,) = [note for note in report["notes"] if "untied" in note]
    assert note == f"{HEAD} is untied from {EMBEDDING}, because it takes the final norm: 0.0 MB more"
    assert report["rotated"] == {
        "kind": "hadamard",
        "r1": 64,
        "r2": 16,
        "tensors": len(plan.view.becomes),
        "untied": [HEAD],
        "config": {"tie_word_embeddings": False},
    }
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert "R1 [64 x 64], R2 [16 x 16]" in (out / "README.md").read_text()
    tensors = load_file(out / "model.safetensors")
    assert not torch.equal(tensors[HEAD], tensors[EMBEDDING])
    assert report["source_fingerprint"] == make_plan(tied, recipe(RTN)).index.identity()
    assert report["bytes_before"] == make_plan(tied, recipe(RTN)).bytes_before


def test_an_untied_head_can_be_quantized(tied: Path, tmp_path: Path) -> None:
    rules = "{match: lm_head, weights: 'int8:channel'}, {match: '*', weights: 'int4:channel'}"
    with pytest.raises(ZqError, match="shares its weight"):
        make_plan(tied, recipe(RTN, rules))
    quantize(make_plan(tied, recipe(ROTATED, rules)), tmp_path / "out")
    assert "lm_head.weight_packed" in load_file(tmp_path / "out" / "model.safetensors")
    with torch.no_grad():
        assert torch.isfinite(zq.load(tmp_path / "out")(token_ids()).logits).all()


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_model_that_stores_both_copies(equal: bool, tied: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tied, source)
    tensors = load_file(source / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    if not equal:
        tensors[HEAD][-1] += 4
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(make_plan(source, recipe(ROTATED, INT8)), out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    with torch.no_grad():
        before, after = (zq.load(folder)(token_ids()).logits for folder in (source, out))
    assert (after - before).norm() < 0.05 * before.norm()


def test_only_r2_keeps_the_tie(tied: Path, tmp_path: Path) -> None:
    plan = make_plan(tied, recipe("{rotate: {r1: false}}, {rtn: {}}"))
    report = quantize(plan, tmp_path / "out").report
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    assert (report["rotated"]["r1"], report["rotated"]["untied"]) == (None, [])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("name", [EMBEDDING, HEAD, "model.norm.weight", "model.layers.1.mlp.down_proj.bias"])
def test_a_changed_copy_is_noticed_though_its_hash_is_right(
    name: str, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rotated source is computed anew, so a tensor that was wrong when it was written is found too."""

    def corrupted(plan: Plan, folder: Path, done: dict) -> dict:
        file = folder / "model.safetensors"
        flip(name)(file)
        unit = next(unit for unit in done.values() if name in unit["tensors"])
        unit["tensors"][name] = tensor_hash(load_file(file)[name])
        return audit(plan, folder, done)

    monkeypatch.setattr(zq.pipeline, "audit", corrupted)
    with pytest.raises(AuditError, match=re.escape(f"tensor '{name}' was to be copied (")):
        quantize(make_plan(tied, recipe(ROTATED)), tmp_path / "out")


def test_a_config_that_ties_them_again_is_noticed(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", "'tie_word_embeddings' in .* is True, and the weights were made for False"
    quantize(make_plan(tied, recipe(ROTATED)), out)
    audit_folder(out)
    config = json.loads((out / "config.json").read_text()) | {"tie_word_embeddings": True}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(AuditError, match=words):
        audit_folder(out)
    real = zq.pipeline.publish

    def tie(plan: Plan, writer: object, target: Path, report: dict) -> None:
        real(plan, writer, target, report)  # type: ignore[arg-type]
        shutil.copyfile(out / "config.json", target / "config.json")

    monkeypatch.setattr(zq.pipeline, "publish", tie)
    with pytest.raises(AuditError, match=words):
        quantize(make_plan(tied, recipe(ROTATED)), tmp_path / "again")


@pytest.mark.parametrize("units", [1, 2, 3, 4])
def test_a_resumed_run_gives_the_same_bytes(units: int, tied: Path, tmp_path: Path) -> None:
    quantize(make_plan(tied, recipe(ROTATED)), tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(make_plan(tied, recipe(ROTATED)), out, progress=stop_after(units))
    for other in ("{rotate: {seed: 1}}, {rtn: {}}", RTN):
        with pytest.raises(ZqError, match="begun with another recipe"):
            quantize(make_plan(tied, recipe(other)), out, resume=True)
    quantize(make_plan(tied, recipe(ROTATED)), out, resume=True)
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("steps", ["{rtn: {}}, {rotate: {}}", "{rotate: {}}, {rotate: {}}, {rtn: {}}"])
def test_it_comes_first_and_once(steps: str, tied: Path) -> None:
    with pytest.raises(ZqError, match=r"^recipe:2: step 'rotate' changes the whole model, so it must"):
        make_plan(tied, recipe(steps))


def test_alone_it_quantizes_nothing(tied: Path) -> None:
    with pytest.raises(ZqError, match=r"^recipe:2: no step quantizes"):
        make_plan(tied, recipe("{rotate: {}}"))


@pytest.mark.parametrize(
    "name",
    [
        EMBEDDING,
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp.down_proj.bias",
    ],
)
def test_nan_names_the_tensor_that_holds_it(name: str, tied: Path, tmp_path: Path) -> None:
    """Not one of those that it would be spread over."""
    shutil.copytree(tied, tmp_path / "bad")
    tensors = load_file(tied / "model.safetensors")
    tensors[name].reshape(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ZqError, match=f"^'{name}' holds NaN or Inf; repair"):
        quantize(make_plan(tmp_path / "bad", recipe(ROTATED)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lower_error_where_channels_hold_outliers(tied: Path, tmp_path: Path) -> None:
    """What it is for: per-channel INT4 of a model with planted outliers."""
    source = tmp_path / "source"
    shutil.copytree(tied, source)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[5] *= 20
        if "o_proj.weight" in name or "down_proj.weight" in name:
            tensor[:, 7] *= 10
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    errors = [
        list(quantize(make_plan(source, recipe(steps)), tmp_path / f"o{i}").report["output_error"].values())[
            -1
        ]
        for i, steps in enumerate((RTN, ROTATED))
    ]
    assert errors[1] < 0.8 * errors[0]


def test_a_dry_run_shows_it_all(tied: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(str(recipe(ROTATED)))
    done = run("quantize", tied, "--recipe", tmp_path / "r.yaml", "--dry-run", "--json").ok().json
    rows = {row["name"]: row for row in done["tensors"]}
    assert rows[HEAD]["becomes"] == "BF16"
    assert "rotated by R1" in rows[HEAD]["why"]
    assert rows["model.layers.0.self_attn.v_proj.weight"]["why"].endswith(
        "; takes the norm before it, rotated by R1, rotated by R2"
    )
    assert any(note.startswith(f"{HEAD} is untied") for note in done["notes"])
    plain = run("quantize", tied, "--w8a16", "--calib", "none", "--dry-run", "--json").ok().json
    assert HEAD not in {row["name"] for row in plain["tensors"]}
