"""zq eval: the numbers are those of a few lines of plain torch and transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zq
from tests.command import run
from zq.runtime import load

WINDOWS, LENGTH = 3, 32
PERPLEXITY = {"nll", "nll_standard_error", "ppl", "tokens", "windows", "length", "conventions"}
COMMON = {"checkpoint", "against", "text", "kind", "kv"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 8)
    return path


def evaluate(*args) -> dict:
    return run("eval", *args, "--windows", WINDOWS, "--length", LENGTH, "--json").ok().json


def log_probabilities(model, folder, text) -> tuple[torch.Tensor, torch.Tensor]:
    """log P of the next token [W, L-1, V] and the tokens [W, L-1], the obvious way."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][: WINDOWS * LENGTH]
    ids = torch.tensor(ids).view(WINDOWS, LENGTH)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits.float()
    return logits[:, :-1].log_softmax(-1), ids[:, 1:]


def test_perplexity(llama, text):
    result = evaluate(llama, "--text", text)
    assert set(result) == COMMON | PERPLEXITY
    assert (result["kind"], result["against"], result["checkpoint"]) == ("perplexity", None, str(llama))
    log_p, targets = log_probabilities(AutoModelForCausalLM.from_pretrained(llama), llama, text)
    nll = -log_p.gather(-1, targets[..., None]).mean().item()
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert result["ppl"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert result["tokens"] == WINDOWS * (LENGTH - 1)


def test_divergence(llama, w4a8, text):
    result = evaluate(w4a8, "--against", llama, "--text", text)
    assert result["kind"] == "divergence"
    assert set(result["reference"]) == set(result["candidate"]) == PERPLEXITY
    log_p, targets = log_probabilities(AutoModelForCausalLM.from_pretrained(llama), llama, text)
    log_q, _ = log_probabilities(zq.load(w4a8), llama, text)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert result["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert result["kl"] > 1e-3
    assert result["kl_p50"] == pytest.approx(kl.quantile(0.5).item(), rel=1e-3)
    assert result["kl_p99"] == pytest.approx(kl.quantile(0.99).item(), rel=1e-3)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item()
    assert result["top1_agreement"] == pytest.approx(agreement)
    nll = -log_q.gather(-1, targets[..., None]).mean().item()
    assert result["candidate"]["nll"] == pytest.approx(nll, rel=1e-5)


def test_a_model_against_itself(llama, text):
    result = evaluate(llama, "--against", llama, "--text", text, "--batch", "2")
    assert (result["kl"], result["kl_max"], result["top1_agreement"]) == (0, 0, 1)


def test_encoders(bert, tmp_path):
    run("quantize", bert, "--w4w8a8", "--calib", "random", "-o", tmp_path / "out").ok()
    result = evaluate(tmp_path / "out", "--against", bert)
    assert result["kind"] == "encoder"
    assert 0.8 < result["token_min"] <= result["token_mean"] < 0.99999
    assert result["sequences"] == WINDOWS
    assert evaluate(bert, "--against", bert)["token_min"] == pytest.approx(1, abs=1e-6)


def test_windows_of_an_encoder_are_cut_at_its_positions(bert):
    result = run("eval", bert, "--against", bert, "--windows", "2", "--json").ok().json
    assert result["tokens"] == 2 * 64


def test_the_tables(llama, w4a8, bert, text):
    options = ("--windows", "2", "--length", "16")
    said = " ".join(run("eval", llama, "--text", text, *options).ok().out.split())
    assert "perplexity" in said
    assert "30 tokens, 2 windows of 16" in said
    said = " ".join(run("eval", w4a8, "--against", llama, *options).ok().out.split())
    for part in (
        "perplexity, original",
        "mean KL",
        "± ",
        "50 / 99 / 99.9 %",
        "same top-1 token",
        "bundled-eval",
    ):
        assert part in said
    said = " ".join(run("eval", bert, "--against", bert, *options).ok().out.split())
    for part in ("cosine, tokens", "cosine, sentences", "2 sequences"):
        assert part in said


def test_one_window_has_no_standard_error(llama):
    done = run("eval", llama, "--windows", "1", "--length", "16").ok()
    assert "±" not in done.out
    assert (
        run("eval", llama, "--windows", "1", "--length", "16", "--json").ok().json["nll_standard_error"]
        is None
    )


def test_start_skips_text(llama, text):
    assert evaluate(llama, "--text", text, "--start", "0.3")["nll"] != evaluate(llama, "--text", text)["nll"]


def test_bloom_has_no_limit_of_positions(tmp_path):
    from tests.letters import save_tokenizer
    from tests.tiny import save_tiny

    save_tiny("bloom", tmp_path / "bloom")
    save_tokenizer(tmp_path / "bloom")
    assert (
        run("eval", tmp_path / "bloom", "--windows", "1", "--length", "100", "--json").ok().json["length"]
        == 100
    )


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_figures_mean_the_simulation(kind, text, monkeypatch, request):
    """Kernels are never asked for, whatever the device."""
    folder, asked = request.getfixturevalue(kind), []
    original = load.load

    def watched(*args, kernels=True, **given):
        asked.append(kernels)
        return original(*args, kernels=kernels, **given)

    monkeypatch.setattr(load, "load", watched)
    evaluate(folder, "--against", folder, "--text", text)
    assert asked == [False, False]
