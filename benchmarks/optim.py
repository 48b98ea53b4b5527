"""Which quantized optimizer states train like 32-bit ones, and which diverge: AdamW on a small model.

    python benchmarks/optim.py --out benchmarks/results/optim-cpu.json            the whole table
    python benchmarks/optim.py --steps 60 --seeds 2 --only "32 bit" "4 bit"       a quick look

The model predicts the next byte of the bundled calibration text. All rows of one seed have the same initial
weights and the same batches. The loss is measured on 64 windows of the evaluation text, which are other
documents. A run has diverged when its last loss is not finite or no better than byte frequencies. The rows of
the second half repeat the ablation of the 4-bit optimizer paper (Li et al. 2023, arXiv:2309.01507, table 1):
the first moment is dynamic4 in blocks of 128, the second as the row says ("DE" dynamic exponent, "DE-0"
without zero, "SE" stable embedding).
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pages
import protocol
import tables
import torch
from torch import Tensor, nn

from zq.data import load_text
from zq.optim import AdamW, StableEmbedding

LENGTH, BATCH, WIDTH, BLOCKS, HEADS = 64, 16, 128, 2, 4
FIRST = {"exp_avg": "dynamic4:b128"}


@dataclass(frozen=True)
class Row:
    """How the states are stored; `stable`: the stable embedding layer."""

    bits: int
    states: dict[str, Any] = field(default_factory=dict)
    stable: bool = False


ROWS: dict[str, Row] = {
    "32 bit": Row(32),
    "32 bit + SE": Row(32, stable=True),
    "8 bit": Row(8),
    "8 bit, B2048": Row(8, {"exp_avg": "dynamic8:b2048", "exp_avg_sq": "udynamic8:b2048"}),
    "8 bit, tensor": Row(8, {"exp_avg": "dynamic8:tensor", "exp_avg_sq": "udynamic8:tensor"}),
    "8 bit, int8 B2048": Row(8, {"exp_avg": "int8:b2048", "exp_avg_sq": "int8:b2048"}),
    "4 bit": Row(4),
    "4 bit, first moment only": Row(4, {"exp_avg_sq": "float32"}),
    "4 bit, second moment only": Row(4, {"exp_avg": "float32"}),
    "4 bit, signed scales": Row(4, {"scale": "absmax-signed"}),
    "4 bit, factored": Row(4, {"exp_avg_sq": "factored"}),
    "B2048/DE": Row(4, {**FIRST, "exp_avg_sq": "udynamic4:b2048"}),
    "B2048/DE + SE": Row(4, {**FIRST, "exp_avg_sq": "udynamic4:b2048"}, stable=True),
    "B128/DE": Row(4, {**FIRST, "exp_avg_sq": "udynamic4:b128"}),
    "B128/DE + stochastic": Row(4, {**FIRST, "exp_avg_sq": "udynamic4:b128", "rounding": "stochastic"}),
    "B128/DE + SE": Row(4, {**FIRST, "exp_avg_sq": "udynamic4:b128"}, stable=True),
    "B2048/DE-0": Row(4, {**FIRST, "exp_avg_sq": "udynamic4nz:b2048"}),
    "B128/DE-0": Row(4, {**FIRST, "exp_avg_sq": "udynamic4nz:b128"}),
    "Rank-1/DE-0": Row(4, {**FIRST, "exp_avg_sq": "udynamic4nz:rank1"}),
    "B128/Linear": Row(4, {**FIRST, "exp_avg_sq": "ulinear4:b128"}),
    "Rank-1/Linear": Row(4, {**FIRST, "exp_avg_sq": "ulinear4:rank1"}),
}


class Block(nn.Module):
    """Pre-norm causal attention and a GELU feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    """Bytes int64 [B, T] -> logits [B, T, 256]."""

    def __init__(self, width: int, blocks: int, stable: bool) -> None:
        super().__init__()
        self.bytes = (StableEmbedding if stable else nn.Embedding)(256, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.bytes(x) + self.places[: x.shape[1]])))


def text(source: str) -> Tensor:
    return torch.tensor(list(load_text(source).encode()), dtype=torch.long)


def windows(data: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.stack([data[s : s + LENGTH + 1] for s in starts.tolist()])
    return found[:, :-1], found[:, 1:]


def batches(data: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield windows(data, torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=generator))


def frequencies(data: Tensor, held: Tensor) -> float:
    """Nats per byte of `held` under the byte frequencies of `data`, each counted once more."""
    counts = torch.bincount(data, minlength=256).double() + 1
    return float(-(counts / counts.sum()).log()[held].mean())


def cross_entropy(model: Model, pair: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(pair[0]).flatten(0, 1), pair[1].flatten())


@dataclass(frozen=True)
class Bench:
    """What every row shares."""

    data: Tensor
    held: tuple[Tensor, Tensor]
    steps: int
    rate: float
    width: int
    blocks: int
    device: str

    def run(
        self, row: Row, seed: int, change: Callable[[Model], object] = lambda model: None
    ) -> dict[str, Any]:
        """Train one model, `change`d before."""
        torch.manual_seed(seed)
        model = Model(self.width, self.blocks, row.stable).to(self.device)
        change(model)
        states = row.states or None
        optimizer = AdamW(model.parameters(), lr=self.rate, bits=row.bits, states=states)
        warm = max(1, self.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / warm))
        worst, spent, begun = 0.0, 0.0, time.perf_counter()
        for i, pair in enumerate(batches(self.data, self.steps, seed)):
            loss = cross_entropy(model, tuple(x.to(self.device) for x in pair))  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss.backward()
            now = time.perf_counter()
            optimizer.step()
            schedule.step()
            spent += time.perf_counter() - now
            value = float(loss.detach())
            if not math.isfinite(value):
                worst = math.inf
                break
            worst = max(worst, value if i >= warm else 0.0)
        with torch.no_grad():
            final = float(cross_entropy(model, self.held))
        count = sum(p.numel() for p in model.parameters())
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        return {
            "loss": final if math.isfinite(final) else None,
            "highest training loss": worst if math.isfinite(worst) else None,
            "parameters": count,
            "state bytes per parameter": optimizer.state_bytes / count,
            "saved bytes per parameter": file.tell() / count,
            "seconds": round(time.perf_counter() - begun, 2),
            "optimizer seconds": round(spent, 2),
        }


def arguments(about: str | None, rows: list[str], seeds: int) -> argparse.Namespace:
    """What integer.py takes too."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=rows, default=rows)
    parser.add_argument("--out", type=Path, help="JSON, continued when it is there")
    parser.add_argument("--write", type=Path, help="a page whose tables are made again from the results")
    parser.add_argument("--commit")
    return parser.parse_args()


def prepared(args: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    """The bench, and the settings that belong to its results; torch takes the wanted threads from here on."""
    torch.set_num_threads(args.threads)
    data, other = text("bundled"), text("bundled-eval")
    held = windows(other, torch.linspace(0, len(other) - LENGTH - 1, 64).long())
    settings = {k: vars(args)[k] for k in ("steps", "rate", "width", "blocks")}
    settings |= {"batch": BATCH, "length": LENGTH, "loss of byte frequencies": frequencies(data, held[1])}
    moved = held[0].to(args.device), held[1].to(args.device)
    return Bench(data, moved, args.steps, args.rate, args.width, args.blocks, args.device), settings


def measured(
    args: argparse.Namespace, table: str, one: Callable[[Bench, str, int], dict[str, Any]], report: Callable
) -> tuple[Bench, protocol.Results, str]:
    """Adds to the results what `one` finds for each name of --only and seed that is not there yet; also
    gives the bench and the commit."""
    bench, settings = prepared(args)
    commit = protocol.commit_of(args.commit)
    results = protocol.Results(args.out, protocol.environment(args.device), settings)
    for seed in range(args.seeds):
        for name in args.only:
            key = {"table": table, "scheme": name, "method": "adamw", "seed": seed}
            if results.find(**key):
                continue
            found = one(bench, name, seed)
            results.add({**key, "commit": commit, **found})
            report(f"{name}, seed {seed}: loss {found['loss']}, {found['seconds']} s")
    return bench, results, commit


def refresh(page: Path | None) -> None:
    """Make the tables of a page again, when there is one."""
    if page:
        page.write_text(pages.refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")


def main(report: Callable[[str], None] = print) -> None:
    args = arguments(__doc__, list(ROWS), 5)
    _, results, _ = measured(args, "optim", lambda bench, name, seed: bench.run(ROWS[name], seed), report)
    report(tables.optim(results.document))
    refresh(args.write)


if __name__ == "__main__":
    main()
