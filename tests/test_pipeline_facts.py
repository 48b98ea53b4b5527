"""What a run says about itself: overflow, identity of the source, and the published folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zq.pipeline
from tests.command import run
from tests.simulate import recipe, stop_after
from tests.tiny import save_tiny
from zq.audit import audit_folder
from zq.checkpoint.writer import ShardWriter
from zq.errors import AuditError, ZqError
from zq.pipeline import _fingerprint, quantize
from zq.plan import make_plan
from zq.recipe import Recipe

OVERFLOW = "activations overflow float16 from block 1 on"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder)
    return folder


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 model whose second block leaves the range of float16."""
    folder = tmp_path_factory.mktemp("overflow")
    save_tiny("llama", folder, torch.float16)
    tensors = load_file(folder / "model.safetensors")
    for name in ("up_proj", "down_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= 2000
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def strict(file: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {file.name}")

    return json.loads(file.read_text(), parse_constant=refuse)


def test_overflow_is_said_and_is_no_number(overflowing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = quantize(make_plan(overflowing, recipe("* = int8:channel")), out).report
    assert 0 < report["output_error"]["0"] < 1
    assert report["output_error"]["1"] is None
    assert OVERFLOW in report["notes"]
    assert strict(out / "zq_report.json") == report
    assert "not measurable: activations overflow" in (out / "README.md").read_text()


def test_people_see_the_overflow(overflowing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("quantize", overflowing, "--w8a16", "--calib", "random", "-o", out).ok()
    assert "output error unknown: overflow" in done.err
    said = " ".join(done.out.split())
    assert "output error unknown after the last block" in said
    assert OVERFLOW in said


def test_an_overflow_survives_a_resume(overflowing: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", make_plan(overflowing, recipe("* = int8:channel"))
    with pytest.raises(KeyboardInterrupt):
        quantize(plan, out, progress=stop_after(3))
    report = quantize(make_plan(overflowing, recipe("* = int8:channel")), out, resume=True).report
    assert OVERFLOW in report["notes"]


def test_the_source_is_the_same_wherever_it_lies(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (1, 1))
    first, second = (make_plan(folder, recipe("* = int8:channel")) for folder in (source, copy))
    assert first.index.fingerprint() != second.index.fingerprint(), "a job must not go on with another file"
    reports = [quantize(plan, tmp_path / f"out{i}").report for i, plan in enumerate((first, second))]
    assert reports[0]["source_fingerprint"] == reports[1]["source_fingerprint"]
    config = json.loads((copy / "config.json").read_text()) | {"rope_theta": 5.0}
    (copy / "config.json").write_text(json.dumps(config))
    third = make_plan(copy, recipe("* = int8:channel")).index.identity()
    assert third != reports[0]["source_fingerprint"]


def test_a_job_depends_on_the_version_of_transformers(source: Path) -> None:
    fingerprint = _fingerprint(make_plan(source, recipe("* = int8:channel")))
    assert fingerprint["transformers version"] == transformers.__version__


def damage_config(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (out / "config.json").write_text(json.dumps(config))


def lose_config(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))


def cut_shard(out: Path) -> None:
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_config, "config.json would give 'lm_head' the scheme int8:channel instead of None"),
        (lose_config, "quantization_config.config_groups is missing"),
        (lambda out: (out / "config.json").write_text("{"), "config.json"),
        (cut_shard, "model.safetensors"),
    ],
)
def test_the_published_folder_is_read_back(
    damage: Callable[[Path], None],
    words: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = ShardWriter.publish

    def publish(self: ShardWriter, target: Path) -> list[Path]:
        done = real(self, target)
        damage(target)
        return done

    monkeypatch.setattr(ShardWriter, "publish", publish)
    with pytest.raises(AuditError) as caught:
        quantize(make_plan(source, recipe("* = int8:channel")), tmp_path / "out")
    assert words in str(caught.value)


@pytest.mark.parametrize("damage", [damage_config, lose_config])
def test_the_audit_of_a_folder_covers_its_config(
    damage: Callable[[Path], None], source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = quantize(make_plan(source, recipe("* = int8:channel")), out).report
    assert report["quantization_config"] == strict(out / "config.json")["quantization_config"]
    audit_folder(out)
    damage(out)
    with pytest.raises(AuditError, match=r"quantization_config in .*config\.json is not that of the run"):
        audit_folder(out)


def test_two_runs_do_not_share_an_output(source: Path, tmp_path: Path) -> None:
    """A second run that comes while the first works is refused and disturbs nothing."""
    out, refused = tmp_path / "out", []

    def intrude(event: dict) -> None:
        for resume in (False, True):
            with pytest.raises(zq.errors.ZqError, match="another zq is working in") as caught:
                quantize(make_plan(source, recipe("* = int8:channel")), out, resume=resume)
            refused.append(caught.value)

    quantize(make_plan(source, recipe("* = int8:channel")), out, progress=intrude)
    assert len(refused) == 10
    audit_folder(out)


LEARNING = """
rules: [{match: '*', weights: 'int4:g32'}]
steps: [STEPS]
calibration: {source: random, samples: 16, length: 16}
"""


def learn(model: Path, out: Path, steps: str) -> dict:
    return quantize(make_plan(model, Recipe.parse(LEARNING.replace("STEPS", steps))), out).report


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_loss_that_overflows_is_no_number_either(lookahead: int, overflowing: Path, tmp_path: Path) -> None:
    report = learn(overflowing, tmp_path / "out", f"rtn, {{lkd: {{iterations: 2, lookahead: {lookahead}}}}}")
    assert report["held_out_loss"]["1"] == {"start": None, "end": None}
    assert (report["held_out_loss"]["0"]["end"] is None) is (lookahead == 1)
    assert OVERFLOW in report["notes"]
    assert strict(tmp_path / "out" / "zq_report.json") == report
    nearest = learn(overflowing, tmp_path / "nearest", "rtn")
    last = [name for name in report["layers"] if ".layers.1." in name]
    assert all(report["layers"][name] == nearest["layers"][name] for name in last), (
        "what it starts from is kept"
    )


def test_people_see_losses_known_or_not(overflowing: Path, tmp_path: Path) -> None:
    recipe_file = tmp_path / "r.yaml"
    recipe_file.write_text(LEARNING.replace("STEPS", "rtn, {lkd: {iterations: 2, lookahead: 0}}"))
    done = run("quantize", overflowing, "--recipe", recipe_file, "-o", tmp_path / "out").ok()
    assert "held-out loss unknown: overflow -> unknown: overflow" in done.err


def test_the_published_training_on_an_overflow_says_so(overflowing: Path, tmp_path: Path) -> None:
    words = r"^step lkd-classic cannot train 'model\.layers\.1': .* more range than torch\.float16"
    with pytest.raises(ZqError, match=words):
        learn(overflowing, tmp_path / "out", "{lkd-classic: {iterations: 2, batch: 8}}")
    assert not (tmp_path / "out").exists()
