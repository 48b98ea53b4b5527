"""zq.data: sources, windows that do not overlap, one-line errors; and the bundled texts themselves."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from zq import data
from zq.errors import ZqError


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (ids 0..255 in byte order of the alphabet) plus a BOS that must not appear."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"<s>": 256}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=16)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


class Counter:
    """A tokenizer whose token i is the i-th character's position: windows show where they are from."""

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        return {"input_ids": list(range(len(text)))}


def write(path, content: str):
    path.write_text(content, encoding="utf-8")
    return str(path)


# sources


def test_files(tmp_path):
    assert data.load_text(write(tmp_path / "a.txt", "Grüße\n")) == "Grüße\n"
    assert data.load_text(write(tmp_path / "README", "any suffix")) == "any suffix"
    lines = [
        json.dumps({"text": "one\u2028line"}, ensure_ascii=False),
        "",
        json.dumps({"text": "two", "id": 3}),
    ]
    assert data.load_text(write(tmp_path / "a.jsonl", "\n".join(lines))) == "one\u2028line\n\ntwo"


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert data.load_text(str(tmp_path / "a.parquet")) == "one\n\ntwo"
    parquet.write_table(pa.table({"n": [1]}), tmp_path / "b.parquet")
    write(tmp_path / "c.parquet", "no parquet")
    for name in ("b", "c"):
        with pytest.raises(ZqError, match="no parquet file with a column named text"):
            data.load_text(str(tmp_path / f"{name}.parquet"))


def test_hub_data_set(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    rows = "".join(json.dumps({"text": t, "body": t.upper()}) + "\n" for t in ("one", "two"))
    write(tmp_path / "set" / "validation.jsonl", rows)
    where = f"hf:{tmp_path / 'set'}"
    assert data.load_text(f"{where}::validation") == "one\n\ntwo"
    assert data.load_text(f"{where}::validation:body") == "ONE\n\nTWO"
    with pytest.raises(ZqError, match="has no column title; name the right one"):
        data.load_text(f"{where}::validation:title")
    with pytest.raises(ZqError, match=r"cannot be loaded: .*; offline, use bundled or a file"):
        data.load_text(f"{where}::test")


def test_hub_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ZqError, match=r"needs the package datasets; run: pip install 'zq\[data\]'"):
        data.load_text("hf:wikitext")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "no text at nowhere.txt; allowed are bundled, bundled-eval"),
        ("hf:", r"hf: is not hf:dataset\[:config\]"),
        ("hf:a:b:c:d:e", "is not hf:dataset"),
        ("random", "random is no text"),
        (".", "cannot be read"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(ZqError, match=message) as caught:
        data.load_text(source)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"Gr\xfc\xdfe")
    with pytest.raises(ZqError, match=r"is not UTF-8 \(byte 2\): convert it"):
        data.load_text(str(tmp_path / "latin.txt"))
    with pytest.raises(ZqError, match="is empty"):
        data.load_text(write(tmp_path / "empty.txt", " \n"))
    for line in ('{"body": "x"}', "text", "[1]", "3"):
        with pytest.raises(ZqError, match='line 2 is not a JSON object with a "text"'):
            data.load_text(write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line))
    with pytest.raises(ZqError, match='line 1: "text" is int'):
        data.load_text(write(tmp_path / "a.jsonl", '{"text": 3}'))


# windows


@pytest.mark.parametrize(
    ("size", "samples", "length"), [(1000, 7, 64), (448, 7, 64), (449, 7, 64), (5, 5, 1)]
)
def test_calibration_windows_are_spread_and_disjoint(tmp_path, size, samples, length):
    source = write(tmp_path / "a.txt", "x" * size)
    seen = set()
    for seed in range(20):
        windows = data.calibration_windows(source, Counter(), size, samples, length, seed)
        assert windows.shape == (samples, length)
        assert windows.dtype == torch.int64
        assert (windows.diff(dim=1) == 1).all()  # consecutive tokens
        starts = windows[:, 0].tolist()
        assert all(b - a >= length for a, b in pairwise(starts))
        # one window in each stretch of size / samples tokens
        for i, start in enumerate(starts):
            assert i * size // samples <= start
            assert start + length <= (i + 1) * size // samples
        seen.add(tuple(starts))
    assert len(seen) == (20 if size == 1000 else 1) or size == 449


def test_calibration_windows_repeat(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", "The quick brown fox. " * 50)
    first = data.calibration_windows(source, tokenizer, 257, 4, 100, seed=3)
    assert torch.equal(first, data.calibration_windows(source, tokenizer, 257, 4, 100, seed=3))
    assert not torch.equal(first, data.calibration_windows(source, tokenizer, 257, 4, 100, seed=4))
    assert tokenizer.decode(first[0].tolist()).count("quick") >= 4
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id  # it would add one
    assert (first != tokenizer.bos_token_id).all()


def test_random_windows_need_no_tokenizer():
    windows = data.calibration_windows("random", None, 50, 8, 512, seed=1)
    assert windows.shape == (8, 512)
    assert windows.unique().tolist() == list(range(50))
    assert torch.equal(windows, data.calibration_windows("random", None, 50, 8, 512, seed=1))
    assert not torch.equal(windows, data.calibration_windows("random", None, 50, 8, 512, seed=2))


def test_evaluation_windows_start_at_a_fraction_of_the_characters(tokenizer):
    text = "ab" * 300 + "cdef" * 100  # 1000 characters
    windows = data.evaluation_windows(text, tokenizer, 3, 32, start=0.55)
    assert windows.shape == (3, 32)
    assert windows.dtype == torch.int64
    expected = [tokenizer.convert_tokens_to_ids(c) for c in text[550 : 550 + 96]]
    assert windows.flatten().tolist() == expected
    # characters, not bytes and not tokens: each ü is two byte-level tokens
    windows = data.evaluation_windows("ü" * 50 + "a" * 50, tokenizer, 1, 50, start=0.5)
    assert windows.unique().tolist() == [tokenizer.convert_tokens_to_ids("a")]


def test_too_short_says_how_short(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", "x" * 99)
    with pytest.raises(ZqError, match=r"has 99 tokens; 10 windows of 10 need 100: .* at most 9 windows"):
        data.calibration_windows(source, tokenizer, 257, 10, 10)
    with pytest.raises(ZqError, match="has 50 tokens from 50% of its characters on; 6 windows of 10 need 60"):
        data.evaluation_windows("x" * 100, tokenizer, 6, 10, start=0.5)


def test_bad_arguments(tokenizer):
    with pytest.raises(ZqError, match="samples = 0 is not allowed"):
        data.calibration_windows("bundled", tokenizer, 257, 0, 10)
    with pytest.raises(ZqError, match="length = -1 is not allowed"):
        data.calibration_windows("random", None, 257, 1, -1)
    with pytest.raises(ZqError, match="windows = 0 is not allowed"):
        data.evaluation_windows("x", tokenizer, 0, 10)
    for start in (-0.1, 1.0, float("nan")):
        with pytest.raises(ZqError, match="is no fraction of the text"):
            data.evaluation_windows("x" * 100, tokenizer, 1, 10, start=start)


def test_a_foreign_tokenizer_is_noticed(tokenizer, tmp_path):
    source = write(tmp_path / "a.txt", "x" * 99)
    highest = tokenizer.convert_tokens_to_ids("x")
    data.calibration_windows(source, tokenizer, highest + 1, 2, 8)
    with pytest.raises(ZqError, match=f"token id {highest}, the model's vocab_size is {highest}"):
        data.calibration_windows(source, tokenizer, highest, 2, 8)
    with pytest.raises(ZqError, match="they do not belong together"):
        data.evaluation_windows("x" * 99, tokenizer, 2, 8, vocab_size=highest)


def test_describe():
    facts = data.describe(torch.tensor([[1, 1, 1, 2], [1, 3, 4, 5]]))
    assert facts == {"windows": 2, "length": 4, "tokens": 8, "distinct": 5, "most_frequent_share": 0.5}


# the bundled texts


@pytest.mark.parametrize(
    ("name", "digest", "size"),
    [("bundled", "579089230f230c39", 904222), ("bundled-eval", "59a2331c04b25633", 307366)],
)
def test_bundled_texts_are_the_built_ones(name, digest, size):
    """A figure in the documentation belongs to these very bytes."""
    content = data.load_text(name).encode("utf-8")
    assert len(content) == size
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_bundled_texts_do_not_overlap():
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 12]) for i in range(len(words) - 11)}

    calibration, evaluation = shingles(data.load_text("bundled")), shingles(data.load_text("bundled-eval"))
    assert len(calibration & evaluation) / len(evaluation) < 0.001


def test_bundled_texts_are_clean_and_mixed():
    kinds = {
        "factbook": (" km ", "independence", "GDP", "government"),
        "rust": ("fn main()", "println!", "trait"),
        "postgresql": ("SELECT", "PostgreSQL"),
        "python": (">>> ", "Python", "def "),
        "austen": (" Mrs. ", "Miss", "said she"),
    }
    for name in ("bundled", "bundled-eval"):
        text = data.load_text(name)
        assert not any(c in text for c in "\r\t\xa0\ufffd¶")
        assert "\n\n\n\n" not in text
        # A few stand in code examples about HTML.
        assert len(re.findall(r"</?(?:p|div|span|code|pre|a|li|em)\b[^>]*>|&\w+;", text)) < 20
        for begin in range(0, len(text) - 150_000, 150_000):  # every part is a mix
            part = text[begin : begin + 150_000]
            for words in kinds.values():
                assert sum(part.count(word) for word in words) >= 2


def test_bundled_licences_name_every_source():
    from importlib import resources

    notice = (resources.files("zq") / "texts" / "LICENSES.md").read_text(encoding="utf-8")
    for needed in ("public domain", "PostgreSQL Global Development Group", "Python Software Foundation",
                   "Rust Project", "Jane Austen", "Retrieved on"):  # fmt: skip
        assert needed in notice
