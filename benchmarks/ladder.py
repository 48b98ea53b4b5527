"""Four sizes of one family of small language models, trained alike, for `zq sweep`.

    python benchmarks/ladder.py LADDER --text bundled --text a.txt --text b.txt \\
           --devices cuda:0,cuda:0,cuda:0,cuda:0                        minutes on one GPU
    zq sweep LADDER/1m LADDER/4m LADDER/11m LADDER/32m --text LADDER/held-out.txt -o OUT

Llama-shaped, tokens are bytes, embeddings tied. Every size sees the same batches in the same order; the rate
falls with the square root of the width. Weights are float32 while they are trained, products bfloat16 on a
GPU, and checkpoints bfloat16. The last part of each text is never trained on: its first half says which step
of the training is kept, since the texts are read several times and a large size may learn them by heart, and
its second half makes LADDER/held-out.txt. A size that is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import protocol
import torch
from spread import spread
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


@dataclass
class Data:
    """Bytes as tokens, int64 [N], on the device."""

    tokenizer: PreTrainedTokenizerFast
    training: Tensor
    choosing: Tensor
    measuring: Tensor


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


def split(texts: list[str], held: float) -> tuple[str, str, str]:
    """(to train on, to choose a step by, to measure on): halves of the last share `held` of every text are
    the last two."""
    parts: tuple[list[str], ...] = ([], [], [])
    for text in texts:
        first, second = int(len(text) * (1 - held)), int(len(text) * (1 - held / 2))
        for part, piece in zip(parts, (text[:first], text[first:second], text[second:]), strict=True):
            part.append(piece)
    training, choosing, measuring = ("\n\n".join(part) for part in parts)
    return training, choosing, measuring


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


@torch.no_grad()
def held_out_loss(model: Any, ids: Tensor, args: argparse.Namespace, device: str) -> float:
    """Nats per byte, over the same windows each time."""
    batches = (windows(ids, args.batch, args.length, 1, i) for i in range(BATCHES_HELD_OUT))
    model.eval()
    found = [loss_on(model, batch, device).item() for batch in batches]
    model.train()
    return sum(found) / len(found)


def train(size: Size, data: Data, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """(the model after the step with the least loss on `choosing`, what became of it). Deterministic on a
    CPU."""
    torch.manual_seed(args.seed)
    device = str(data.training.device)
    model: Any = LlamaForCausalLM(config(size, args.length, len(data.tokenizer))).to(device)
    run = torch.compile(model) if args.compile else model
    peak = args.rate * math.sqrt(256 / size.width)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    begun = time.perf_counter()
    course: dict[int, float] = {}
    best: dict[str, Tensor] = {}
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step - 1, args.steps, peak)
        batch = windows(data.training, args.batch, args.length, args.seed, step - 1)
        loss_on(run, batch, device).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.every == 0 or step == args.steps:
            course[step] = held_out_loss(model, data.choosing, args, device)
            if course[step] == min(course.values()):
                best = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    kept = min(course, key=lambda step: course[step])
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": len(data.training),
        "tokens": args.steps * args.batch * args.length,
        "course": course,
        "step": kept,
        "held_out_loss": held_out_loss(model, data.measuring, args, device),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    return model.eval(), facts


def save(model: Any, made: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face checkpoint in bfloat16; whole or not there at all."""
    fresh = folder.with_name(f".{folder.name}.new")
    model.to(torch.bfloat16).save_pretrained(fresh)
    made.save_pretrained(fresh)
    fresh.rename(folder)


def read(args: argparse.Namespace, device: str) -> Data:
    made = tokenizer()
    parts = split([load_text(name) for name in args.text], args.held)
    ids = [torch.tensor(made(text, verbose=False)["input_ids"], device=device) for text in parts]
    if min(len(part) for part in ids) <= args.length + 1:
        raise SystemExit(f"the texts are too short for windows of {args.length}; give more --text")
    return Data(made, *ids)


def make(args: argparse.Namespace, data: Data, task: tuple[str, Size]) -> dict[str, Any]:
    """Trains and saves a size."""
    name, size = task
    model, found = train(size, data, args)
    facts = {
        **found,
        "options": options_of(args),
        "commit": args.commit,
        **protocol.environment(data.training.device.type),
    }
    save(model, data.tokenizer, args.out / name)
    (args.out / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    return found


def options_of(args: argparse.Namespace) -> dict[str, str]:
    """What makes other weights."""
    return {
        name: str(value) for name, value in vars(args).items() if name not in ("out", "devices", "commit")
    }


def missing(args: argparse.Namespace) -> list[tuple[str, Size]]:
    """The largest first, since it takes longest."""
    found = []
    for name, size in reversed((TINY if args.tiny else SIZES).items()):
        log = args.out / f"{name}.json"
        if log.exists():
            if json.loads(log.read_text())["options"] != options_of(args):
                raise SystemExit(f"{args.out / name} was trained with other options; give another folder")
            print(f"{name} is there already")
        else:
            shutil.rmtree(args.out / name, ignore_errors=True)
            found.append((name, size))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", action="append", default=[], metavar="FILE", help="to train on; or bundled")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=100, help="steps between looks at the held-out loss")
    parser.add_argument("--batch", type=int, default=64, help="windows in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak, at width 256")
    parser.add_argument("--held", type=float, default=0.1, help="share of each text that is held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", default="cpu", help="a process for each: cuda:0,cuda:0,cuda:1")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--tiny", action="store_true", help="two models of no use, in seconds")
    parser.add_argument("--commit", help="to note beside the models, where there is no git")
    args = parser.parse_args()
    args.commit = protocol.commit_of(args.commit)
    if not args.text:
        raise SystemExit("give at least one --text FILE to train on")
    wanted = missing(args)
    args.out.mkdir(parents=True, exist_ok=True)
    held = split([load_text(name) for name in args.text], args.held)[2]
    (args.out / "held-out.txt").write_text(held, encoding="utf-8")
    devices = args.devices.split(",")
    done: Iterator[tuple[Any, Any, int]]
    if len(devices) > 1:
        done = spread(wanted, devices[: len(wanted)], partial(read, args), partial(make, args))
    else:
        data = read(args, devices[0])
        done = ((task, make(args, data, task), 0) for task in wanted)
    for (name, _), found, _ in done:
        print(f"{name}: {found}", flush=True)


if __name__ == "__main__":
    main()
