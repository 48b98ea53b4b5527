"""Four sizes of one family of small language models, trained alike, for `zq sweep`.

    python benchmarks/ladder.py LADDER --text a.txt --text b.txt --device cuda      minutes on one GPU
    zq sweep LADDER/1m LADDER/4m LADDER/11m LADDER/32m --text LADDER/held-out.txt -o OUT

Llama-shaped, tokens are bytes, embeddings tied. Every size sees the same batches in the same order; the rate
falls with the square root of the width. Weights are float32 while they are trained, products bfloat16 on a
GPU, and checkpoints bfloat16. The last part of each text is held out: it makes LADDER/held-out.txt and is
never trained on. A size that is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import protocol
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zq.data import load_text

SPECIAL = ("<s>", "</s>")
BATCHES_HELD_OUT = 8


@dataclass(frozen=True)
class Size:
    """Of a model: width, heads, feed-forward width and blocks."""

    width: int
    heads: int
    inner: int
    blocks: int


SIZES = {
    "1m": Size(128, 4, 384, 5),
    "4m": Size(256, 4, 704, 5),
    "11m": Size(384, 6, 1024, 6),
    "32m": Size(512, 8, 1408, 10),
}
TINY = {"a": Size(32, 2, 64, 1), "b": Size(64, 2, 128, 2)}  # to see that it works


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and two special ones in front that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL, *pieces))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=SPECIAL[0], eos_token=SPECIAL[1])


def split(texts: list[str], held: float) -> tuple[str, str]:
    """(to train on, held out): the last share `held` of every text."""
    ends = [int(len(text) * (1 - held)) for text in texts]
    return (
        "\n\n".join(text[:end] for text, end in zip(texts, ends, strict=True)),
        "\n\n".join(text[end:] for text, end in zip(texts, ends, strict=True)),
    )


def config(size: Size, length: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        architectures=["LlamaForCausalLM"],
    )


def rate(step: int, steps: int, peak: float) -> float:
    """Up in a line over the first 2 % of the steps, then a cosine down to a tenth."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * along)))


def windows(ids: Tensor, count: int, length: int, seed: int, step: int) -> Tensor:
    """`count` windows of length + 1 tokens int64, drawn by seed and step alone: the same for every size."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(ids) - length, (count,), generator=generator)
    return ids[starts[:, None].to(ids.device) + torch.arange(length + 1, device=ids.device)]


def loss_on(model: Any, batch: Tensor, device: str) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def train(
    size: Size, ids: Tensor, held: Tensor, vocabulary: int, args: argparse.Namespace
) -> tuple[Any, dict]:
    """(the model, what became of it). Deterministic on a CPU."""
    torch.manual_seed(args.seed)
    model: Any = LlamaForCausalLM(config(size, args.length, vocabulary)).to(args.device)
    run = torch.compile(model) if args.compile else model
    peak = args.rate * math.sqrt(256 / size.width)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    begun = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps, peak)
        loss = loss_on(run, windows(ids, args.batch, args.length, args.seed, step), args.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == args.steps - 1:
            print(f"  step {step}: {loss.item():.4f}", flush=True)
    model.eval()
    with torch.no_grad():
        found = [
            loss_on(model, windows(held, args.batch, args.length, 1, i), args.device).item()
            for i in range(BATCHES_HELD_OUT)
        ]
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": args.steps * args.batch * args.length,
        "held_out_loss": sum(found) / len(found),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    return model, facts


def save(model: Any, made: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face checkpoint in bfloat16; whole or not there at all."""
    fresh = folder.with_name(f".{folder.name}.new")
    model.to(torch.bfloat16).save_pretrained(fresh)
    made.save_pretrained(fresh)
    fresh.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", action="append", default=[], metavar="FILE", help="to train on; or bundled")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64, help="windows in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak, at width 256")
    parser.add_argument("--held", type=float, default=0.1, help="share of each text that is held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--tiny", action="store_true", help="two models of no use, in seconds")
    args = parser.parse_args()
    if not args.text:
        raise SystemExit("give at least one --text FILE to train on")
    training, held = split([load_text(name) for name in args.text], args.held)
    made = tokenizer()
    ids, held_ids = (
        torch.tensor(made(text, verbose=False)["input_ids"], device=args.device) for text in (training, held)
    )
    if min(len(ids), len(held_ids)) <= args.length + 1:
        raise SystemExit(f"the texts are too short for windows of {args.length}; give more --text")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "held-out.txt").write_text(held, encoding="utf-8")
    log = args.out / "ladder.json"
    facts = json.loads(log.read_text()) if log.exists() else {}
    options = {name: str(value) for name, value in vars(args).items() if name != "out"}
    for name, size in (TINY if args.tiny else SIZES).items():
        if (args.out / name).exists():
            if facts.get(name, {}).get("options") != options:
                raise SystemExit(f"{args.out / name} was trained with other options; give another folder")
            print(f"{name} is there already")
            continue
        print(name, flush=True)
        model, found = train(size, ids, held_ids, len(made), args)
        facts[name] = {**found, "options": options, **protocol.environment(args.device)}
        log.write_text(json.dumps(facts, indent=1) + "\n")
        save(model, made, args.out / name)
        print(f"  {found}", flush=True)


if __name__ == "__main__":
    main()
