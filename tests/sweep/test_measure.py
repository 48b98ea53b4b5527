"""A cell is what `zq quantize` writes and `zq eval` measures, to the bit."""

from __future__ import annotations

import json

import pytest
import torch

from tests.sweep.conftest import SETTING
from tests.tiny import save_tiny
from zq.checkpoint.index import read_index
from zq.data import load_text
from zq.errors import ZqError
from zq.eval.adapt import decoder_logits
from zq.eval.divergence import divergence
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.runtime.load import load
from zq.sweep.grid import NEAREST, Cell, recipe_of
from zq.sweep.measure import Bench, Remembered, cell_key, planned, sizes
from zq.sweep.subjects import environment, subject, subjects

CELL = Cell("llama", 3, "quantile", "64", 0, "quantile3:b64")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench("cpu", SETTING, NEAREST, tmp_path_factory.mktemp("bench") / "scratch")


def test_a_cell_is_what_quantize_and_eval_say(swept, bench, tmp_path):
    row = bench.measure(swept[0], CELL)
    quantize(make_plan(swept[0].folder, recipe_of(CELL)), tmp_path / "out")
    windows = torch.tensor(swept[0].windows)
    both = decoder_logits(load(swept[0].folder)), decoder_logits(load(tmp_path / "out"))
    report = divergence(*both, windows)
    assert (row["kl"], row["kl_standard_error"]) == (report.kl, report.kl_standard_error)
    assert (row["ppl"], row["nll"]) == (report.candidate.ppl, report.candidate.nll)
    assert row["top1_agreement"] == report.top1_agreement
    assert sum(row["kl_windows"]) / 5 == pytest.approx(row["kl"], rel=1e-12)
    assert sum(row["nll_windows"]) / 5 == pytest.approx(row["nll"], rel=1e-12)
    assert row["kl"] > 0.01
    index = read_index(tmp_path / "out")
    assert row["bytes"]["all"] == index.nbytes
    inside = sum(info.nbytes for name, info in index.tensors.items() if ".layers." in name)
    assert row["bytes"]["blocks"] == inside < index.nbytes
    assert json.loads(json.dumps(row)) == row


def test_the_folder_of_a_cell_is_gone(swept, bench):
    bench.measure(swept[0], CELL)
    assert not bench.scratch.exists()


def test_an_original_is_as_far_from_itself_as_nothing(swept, bench):
    for each in swept:
        row = bench.measure(each, each.original)
        assert (row["kl"], row["top1_agreement"], row["bits_per_weight"]) == (0, 1, 32)
        model = load(each.folder)
        parameters = {p.data_ptr(): p for p in model.parameters()}.values()  # tied ones once
        assert row["bytes"]["all"] == sum(p.numel() * p.itemsize for p in parameters)
        inside = sum(p.numel() * p.itemsize for p in model.model.layers.parameters())
        assert row["bytes"]["blocks"] == inside
        assert row["model"]["parameters"] == {
            "all": sum(p.numel() for p in parameters),
            "blocks": inside // 4,
        }


def test_planned_sizes_are_those_that_are_written(swept, bench):
    for spec in ("int4:channel", "quantile3:channel", "nf5:b64", "e2m1paper:b1024"):
        cell = Cell("llama", 4, "x", "y", 0, spec)
        row = bench.measure(swept[0], cell)
        assert sizes(planned(swept[0], cell, NEAREST), cell) == row["bytes"]


def test_remembered_logits_are_the_same_bits_and_only_up_to_a_size(swept, monkeypatch):
    model, windows = load(swept[0].folder), torch.tensor(swept[0].windows)
    plain, remembered = decoder_logits(model), Remembered(model)
    first = [remembered(ids) for ids in windows.split(2)]
    again = [remembered(ids) for ids in windows.split(2)]
    for ids, one, two in zip(windows.split(2), first, again, strict=True):
        assert two is one
        assert torch.equal(one, plain(ids))
    small = Remembered(model)
    monkeypatch.setattr("zq.sweep.measure.KEEP", first[0].nbytes)
    kept = small(windows[:2])
    assert small(windows[:2]) is kept
    assert small(windows[2:4]) is not small(windows[2:4])
    assert small.nbytes == first[0].nbytes


def test_keys_know_model_recipe_seed_and_setting(swept):
    keys = {
        cell_key(swept[0], CELL, NEAREST, SETTING),
        cell_key(swept[1], CELL, NEAREST, SETTING),
        cell_key(swept[0], Cell("llama", 3, "quantile", "64", 1, "quantile3:b64"), NEAREST, SETTING),
        cell_key(swept[0], Cell("llama", 3, "quantile", "32", 0, "quantile3:b32"), NEAREST, SETTING),
        cell_key(swept[0], CELL, NEAREST, SETTING | {"length": 25}),
        cell_key(swept[0], swept[0].original, NEAREST, SETTING),
    }
    assert len(keys) == 6
    # How a user spelled the cell or called the model is not what it is.
    renamed = Cell("other name", 3, "some", "b64", 0, "quantile3:b64")
    assert cell_key(swept[0], renamed, NEAREST, SETTING) in keys


def test_the_identity_is_that_of_the_contents(swept, tmp_path):
    """Two models of a ladder have the same headers; a copy of one is the same model."""
    from tests.letters import save_tokenizer

    for name, seed in (("copy", 0), ("other", 1)):
        save_tiny("llama", tmp_path / name, seed=seed)
        save_tokenizer(tmp_path / name)
    text = load_text("bundled-eval")
    copy, other = (subject(n, tmp_path / n, text, 5, 24, 0.0) for n in ("copy", "other"))
    assert copy.identity == swept[0].identity != other.identity
    assert subject("copy", tmp_path / "copy", text, 4, 24, 0.0).identity != copy.identity


def test_models_are_named_by_what_tells_them_apart(swept):
    found, tokens = subjects([str(s.folder) for s in swept], "bundled-eval", 5, 24, 0.0)
    assert [s.name for s in found] == ["llama", "llama-tied"]
    assert found[0].identity == swept[0].identity
    assert tokens["text"].startswith("bundled-eval sha256:")
    with pytest.raises(ZqError, match="are the same model"):
        subjects([str(swept[0].folder), f"{swept[0].folder}/."], "bundled-eval", 5, 24, 0.0)


def test_an_encoder_is_refused(tiny):
    with pytest.raises(ZqError, match="is an encoder"):
        subject("bert", tiny("bert"), "text", 1, 4, 0.0)


def test_the_environment_names_the_device():
    assert environment(["cpu", "cpu"])["device"] == "cpu"
