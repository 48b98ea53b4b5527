"""A tokenizer for the tiny models: one token per printable ASCII character, no file from anywhere."""

from __future__ import annotations

from pathlib import Path

SPECIAL = ("<unk>", "<s>", "</s>")
CHARACTERS = tuple(map(chr, range(32, 127)))


def save_tokenizer(folder: Path, *, template: str | None = None, start: int = 0) -> None:
    """Write tokenizer.json and its config into `folder`.

    Ids 0, 1, 2 are special; `start` moves the characters up, past a small vocabulary.
    `template` is a chat template.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    vocabulary |= {c: start + len(SPECIAL) + i for i, c in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    if template:
        fast.chat_template = template
    fast.save_pretrained(folder)


def save_bpe(folder: Path) -> None:
    """The same as byte-level BPE with a merge or two, of the kind of GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *CHARACTERS[1:], "\u0120", "ab", "ba"]  # byte-level BPE writes a space as U+0120
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "b"), ("b", "a")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.save_pretrained(folder)
