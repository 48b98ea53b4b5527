# ruff: noqa: T201 (a script)
"""The matrix kernels on a GPU, without pytest, for a machine that is there for minutes only.

    python -m tests.kernels.gpu_smoke build DIR [--arch sm_90a] [--only REGEX] [-D...]  needs no GPU
    python -m tests.kernels.gpu_smoke check DIR [--only REGEX] [--portable] [-D...]     right or wrong
    python -m tests.kernels.gpu_smoke time DIR [--only REGEX] [--portable]    microseconds, beside cuBLAS
    python -m tests.kernels.gpu_smoke sweep DIR [--only REGEX] [--shapes NxK,...] [--tokens M,...]
                                                              every tile; corrects tiles.py
    python -m tests.kernels.gpu_smoke ceiling DIR                             what the tensor core can do

`check` runs every scheme in a process of its own with a time limit, four at once, so that a wrong address or
a hang of one costs the others nothing. It tries what `choose` chooses and every tile, cluster and split.
-DZQ_TRAP=1 ends a hang with an error, -DZQ_PLAIN=3 copies with ordinary loads (gemm_sm90.cu).
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tests.kernels.gpu_cases import LARGE, SHAPES, make, verdict
from tests.kernels.gpu_launch import Driver, compile_unit, cubin_file, gemm
from zq.kernels import layout, tiles
from zq.kernels.table_gemm import CEILINGS, GEMM_UNITS
from zq.kernels.tiles import Config
from zq.kernels.unit import Unit

LIMIT = 90  # seconds for one scheme
TIMED = [(28672, 8192), (6144, 4096)]
TOKENS = (1, 16, 64, 256, 1024, 4096)
TIMED_UNITS = (
    "w4a8_int8_g128",
    "w4a8_int8_group_g128",
    "w4a8_fp8_g128",
    "w4a16_g128",
    "w8a8_int8",
    "w8a8_fp8",
    "fp8_block128",
    "w8a16",
)


def scheme_of(unit: Unit) -> tuple[str, layout.Packing]:
    facts = dict(unit.defines)
    op = unit.ops[0]
    return op, tiles.packing(op, int(facts["ZQ_GROUP"]), facts["ZQ_ASYM"] == "1", facts["ZQ_HALF"] == "1")


def forced(op: str, p: layout.Packing, m: int, n: int, k: int, sms: int, family: int) -> Iterator[Config]:
    """What `choose` gives, and every other way to compute the same."""
    chosen = tiles.choose(op, m, n, k, group=p.group, arch=family, sms=sms, asym=p.asym, half=p.half)
    yield chosen
    steps = -(-k // layout.STEP)
    if family != 90:
        tile = next(t for t in tiles.tiles(op, p, family) if t.entry == chosen.entry)
        yield from (tiles.portable(op, p, tile, split, (m, n), family) for split in (2, 3, 8))
        return
    for tile, (cluster, split) in itertools.product(
        tiles.tiles(op, p, 90),
        ((1, 0), (1, 1), (2, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8)),
    ):
        sharing = cluster // max(split, 1)
        if (sharing > 1 and tile.tokens < 16) or (split > 1 and (tile.tokens > 64 or steps < split)):
            continue
        if m > 16 * tile.tokens:
            continue
        config = tiles.persistent(op, p, tile, cluster, split, (m, n, k), sms)
        yield config if split != 1 else replace(config, grid=(min(config.grid[0], 16 * cluster), 1, 1))


def run_case(driver: Driver, folder: Path, c: Config, arch: str, case: dict, more: list[str]) -> Tensor:
    m, n = case["exact"].shape
    guarded = torch.full((m + 2, n), float("nan"), dtype=case["out"], device="cuda")
    case["y"] = guarded[:m]
    if c.workspace:
        case["workspace"] = torch.full((c.workspace,), 255, dtype=torch.uint8, device="cuda")
        case["workspace"][: c.zeroed] = 0
    gemm(driver, folder, c, arch, case, more)
    torch.cuda.synchronize()
    assert bool(guarded[m:].isnan().all()), "wrote beyond y"
    assert not c.workspace or not bool(case["workspace"][: c.zeroed].any()), "counters are not zero again"
    return case["y"]


def check_unit(unit: Unit, folder: Path, arch: str, more: list[str]) -> int:
    """Every shape and way of one scheme; prints a line for each failure and one for the whole."""
    driver, (op, p) = Driver(), scheme_of(unit)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    family = 90 if unit.source == "gemm_sm90.cu" else 89  # as `choose` understands it
    failures = cases = 0
    for seed, (m, n, k) in enumerate([*SHAPES, LARGE]):
        out = torch.float16 if (p.half if p.act_bytes == 2 else seed % 2) else torch.bfloat16
        case = make(op, p, m, n, k, out, bias=seed % 2 == 0, seed=seed)
        for c in forced(op, p, m, n, k, sms, family):
            c = replace(c, unit=unit.name)
            what = f"{unit.name} {m}x{n}x{k} {c.entry} cluster {c.cluster} split {c.split}"
            print(f"  {what} ...", end=" ", flush=True)
            wrong = verdict(op, case, run_case(driver, folder, c, arch, case, more))
            print(wrong or "ok", flush=True)
            failures += bool(wrong)
            cases += 1
    print(f"{'FAIL' if failures else 'PASS'} {unit.name}: {cases - failures} of {cases}", flush=True)
    return failures


def check(units: list[Unit], arguments: argparse.Namespace) -> None:
    def one(unit: Unit) -> None:
        command = [sys.executable, "-m", "tests.kernels.gpu_smoke", "child", str(arguments.folder)]
        command += ["--only", f"^{unit.name}$", "--arch", arguments.arch, *arguments.more]
        started = time.time()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
            lines, error = done.stdout.splitlines(), done.stderr.strip().splitlines()[-1:]
        except subprocess.TimeoutExpired as stuck:
            lines, error = (stuck.stdout or b"").decode().splitlines(), [f"no answer for {LIMIT} s"]
        bad = [line for line in lines if line.startswith("  ") and not line.endswith("... ok")]
        summary = [line for line in lines if not line.startswith("  ")] or [
            f"FAIL {unit.name}: {' '.join(error)}"
        ]
        lasted = f"  ({time.time() - started:.0f} s)"
        print("\n".join([*bad[:6], *summary]) + lasted, flush=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, units))


def replay(calls: list, repeats: int = 5) -> float:
    """Microseconds a call, calls recorded as one CUDA graph; the best of a few replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(max(1, 20 // len(calls))):
                for call in calls:
                    call()
        each = max(1, 20 // len(calls)) * len(calls)
        best = float("inf")
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            best = min(best, begin.elapsed_time(end) * 1000 / each)
    return best


def operands(op: str, p: layout.Packing, m: int, n: int, k: int, copies: int) -> list[dict]:
    """Timing only: random bytes for weights (finite for FP8), small activations."""
    x = torch.randint(-9, 9, (m, k), device="cuda").to(torch.int8)
    x = x.to(torch.bfloat16) if p.act_bytes == 2 else x.float().to(torch.float8_e4m3fn) if "fp8" in op else x
    size, found = layout.packed_bytes(p, n, k), []
    for _ in range(copies):
        w = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
        if p.bits == 8 and "fp8" in op:
            w &= 0xBF
        case = {"x": x, "w": w, "y": torch.empty(m, n, dtype=torch.bfloat16, device="cuda")}
        if p.act_bytes == 1:
            case["sx"] = torch.ones(m, -(-k // 128) if op == "fp8_block128" else 1, device="cuda")
        if op == "w4a8_int8":
            case["rowsum"] = torch.zeros(m, dtype=torch.int32, device="cuda")
        if p.group == 0 or op == "w4a8_int8":
            case["ws"] = torch.ones(n, device="cuda")
        found.append(case)
    return found


def our_time(driver: Driver, folder: Path, c: Config, arch: str, cases: list[dict]) -> float:
    if c.workspace:
        scratch = torch.zeros(c.workspace, dtype=torch.uint8, device="cuda")
        cases = [{**case, "workspace": scratch} for case in cases]
    return replay([partial(gemm, driver, folder, c, arch, case) for case in cases])


def cublas(m: int, n: int, k: int) -> dict[str, float]:
    found = {}
    copies = max(2, -(-(512 << 20) // (n * k)))
    for kind in ("bf16", "int8", "fp8", "fp8 rows"):
        dtype = {"bf16": torch.bfloat16, "int8": torch.int8}.get(kind, torch.float8_e4m3fn)
        x = torch.randint(-9, 9, (m, k), device="cuda").to(torch.int8).to(torch.float32).to(dtype)
        ws = [torch.randint(-9, 9, (n, k), device="cuda").to(torch.float32).to(dtype) for _ in range(copies)]
        one = torch.ones(1, device="cuda")
        a, b = (
            (one, one)
            if kind == "fp8"
            else (torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda"))
        )

        def call(w: Tensor, kind: str = kind, x: Tensor = x, a: Tensor = a, b: Tensor = b) -> Tensor:
            if kind == "bf16":
                return x @ w.T
            if kind == "int8":
                return torch._int_mm(x, w.T)
            options = {"scale_a": a, "scale_b": b, "out_dtype": torch.bfloat16, "use_fast_accum": True}
            return torch._scaled_mm(x, w.T, **options)

        try:
            found[kind] = replay([partial(call, w) for w in ws])
        except RuntimeError:
            found[kind] = float("nan")
    return found


def timing(units: list[Unit], folder: Path, arch: str) -> None:
    driver, sms = Driver(), torch.cuda.get_device_properties(0).multi_processor_count
    print(torch.cuda.get_device_name(), torch.__version__, "microseconds; x = against cuBLAS bf16")
    for n, k in TIMED:
        print(f"\nN={n} K={k}\n{'':24}" + "".join(f"{m:>16}" for m in TOKENS))
        base = [cublas(m, n, k) for m in TOKENS]
        for kind in base[0]:
            print(f"{'cuBLAS ' + kind:24}" + "".join(f"{b[kind]:16.1f}" for b in base), flush=True)
        for unit in units:
            (op, p), cells = scheme_of(unit), []
            copies = max(2, -(-(512 << 20) // layout.packed_bytes(p, n, k)))
            for m, b in zip(TOKENS, base, strict=True):
                family = 90 if "sm90" in unit.name else 89
                c = tiles.choose(op, m, n, k, group=p.group, arch=family, sms=sms)
                cases = operands(op, p, m, n, k, copies)
                try:
                    us = our_time(driver, folder, replace(c, unit=unit.name), arch, cases)
                    cells.append(f"{us:9.1f} {b['bf16'] / us:5.2f}x")
                except RuntimeError as error:
                    cells.append(f"{str(error)[:15]:>16}")
            print(f"{unit.name:24}" + "".join(cells), flush=True)


def sweep(
    units: list[Unit], folder: Path, arch: str, shapes: list[tuple[int, int]], tokens: list[int]
) -> None:
    """Every tile and split, the best first; "*" is what `choose` takes."""
    driver, sms = Driver(), torch.cuda.get_device_properties(0).multi_processor_count
    for unit, (n, k), m in itertools.product(units, shapes, tokens):
        op, p = scheme_of(unit)
        copies = max(2, min(64, -(-(512 << 20) // layout.packed_bytes(p, n, k))))
        cases = operands(op, p, m, n, k, copies)
        chosen = tiles.choose(op, m, n, k, group=p.group, arch=90, sms=sms)
        cells = []
        for tile, split in itertools.product(tiles.tiles(op, p, 90), range(9)):
            blocks = -(-n // tile.rows) * -(-m // tile.tokens)
            fits = split <= 1 or (tile.tokens <= 64 and blocks * split <= 2 * tiles.resident(tile) * sms)
            if tile.tokens > 4 * m + 8 or m > 64 * tile.tokens or not fits or split > k // 128:
                continue
            c = tiles.persistent(op, p, tile, max(split, 1), split, (m, n, k), sms)
            us = our_time(driver, folder, c, arch, cases)
            mark = "*" * ((c.entry, c.split) == (chosen.entry, chosen.split))
            together = driver.clusters(cubin_file(folder, unit.name, arch), c)
            cells.append((us, f"{tile.entry}/{split}{mark} {us:.2f} ({c.grid[0]} of {together * c.cluster})"))
        best = ", ".join(text for _, text in sorted(cells))
        print(f"{unit.name} {m}x{n}x{k}: {best}", flush=True)


def ceiling(folder: Path, arch: str) -> None:
    driver, sms = Driver(), torch.cuda.get_device_properties(0).multi_processor_count
    data = torch.randint(0, 256, (1 << 18,), dtype=torch.uint8, device="cuda") & 0xBF  # no NaN in e4m3
    sink, rounds = torch.zeros(4, dtype=torch.int32, device="cuda"), 20000
    for unit, tokens in itertools.product(CEILINGS, (128, 256)):
        c = Config(unit=unit.name, entry=f"n{tokens}", grid=(sms, 1, 1), block=256, shared=tokens * 128)
        file = cubin_file(folder, unit.name, arch)
        us = replay([partial(driver.launch, file, c, [data, rounds, sink])], 3)
        operations = sms * 2 * 64 * tokens * 128 * 2 * rounds
        print(f"{unit.name} N={tokens}: {operations / us / 1e6:.0f} Tera-operations/s", flush=True)


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def pairs(text: str) -> list[tuple[int, int]]:
    return [(int(n), int(k)) for n, k in (each.split("x") for each in text.split(","))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("build", "check", "child", "time", "sweep", "ceiling"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--only", default="^sm90_")
    parser.add_argument("--shapes", type=pairs, default=TIMED, help="sweep: 4096x4096,6144x4096 (N x K)")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, help="sweep: 1,16")
    parser.add_argument("--portable", action="store_true", help="gemm_mma.cu on any architecture")
    arguments, arguments.more = parser.parse_known_args()
    wanted = "^mma_" if arguments.portable and arguments.only == "^sm90_" else arguments.only
    units = [unit for unit in GEMM_UNITS if re.search(wanted, unit.name)]
    folder, arch = arguments.folder, arguments.arch
    if arguments.command == "build":
        folder.mkdir(parents=True, exist_ok=True)
        for unit in [*units, *CEILINGS] if arch == "sm_90a" else units:
            cubin = compile_unit(unit, arch, arguments.more)
            cubin_file(folder, unit.name, arch, arguments.more).write_bytes(cubin)
            print(unit.name, flush=True)
    elif arguments.command == "child":
        sys.exit(check_unit(units[0], folder, arch, arguments.more) > 0)
    elif arguments.command == "check":
        check(units, arguments)
    elif arguments.command == "ceiling":
        ceiling(folder, arch)
    else:
        named = [u for u in units if u.name.split("_", 1)[1] in TIMED_UNITS]
        if arguments.command == "time":
            timing(named, folder, arch)
        else:
            sweep(named, folder, arch, arguments.shapes, arguments.tokens)


if __name__ == "__main__":
    main()
