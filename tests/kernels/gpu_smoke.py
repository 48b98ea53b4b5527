"""The matrix kernels on a GPU, without pytest, made for a short lease of a machine.

    python -m tests.kernels.gpu_smoke build DIR [--arch sm_90a] [--only REGEX] [-DZQ_PLAIN=3]   no GPU needed
    python -m tests.kernels.gpu_smoke check DIR [--only REGEX] [--portable] [-D...]  one line for each case
    python -m tests.kernels.gpu_smoke time DIR [--only REGEX]                        microseconds beside cuBLAS
    python -m tests.kernels.gpu_smoke sweep DIR [--only REGEX]                       every tile, to correct zq.kernels.tiles
    python -m tests.kernels.gpu_smoke ceiling DIR                                    what the tensor core can do

`check` runs every scheme in a process of its own with a time limit, four at once, so that a wrong address or a
hang of one costs the others nothing. It tries what `choose` chooses and every tile, cluster and split by force.
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
from pathlib import Path

import torch
from torch import Tensor

from tests.kernels.gpu_launch import Driver, compile_unit, cubin_file, gemm
from zq.kernels import layout, tiles
from zq.kernels.table_gemm import GEMM_UNITS, macros
from zq.kernels.tiles import Config
from zq.kernels.unit import Unit

SHAPES = [(1, 128, 128), (3, 256, 512), (17, 200, 1040), (64, 1024, 2048), (130, 387, 1168), (300, 1536, 4096)]
LARGE = (513, 4096, 1040)
LIMIT = 90  # seconds for one scheme
TIMED = [(28672, 8192), (6144, 4096)]
TOKENS = (1, 16, 64, 256, 1024, 4096)
TIMED_UNITS = ("w4a8_int8_g128", "w4a8_fp8_g128", "w4a16_g128", "w8a8_int8", "w8a8_fp8", "fp8_block128", "w8a16")
CEILING = Unit(name="bench_ceiling", source="bench_ceiling.cu", entries=("n128", "n256"), ops=())


def scheme_of(unit: Unit) -> tuple[str, layout.Packing]:
    facts = dict(unit.defines)
    op = unit.ops[0]
    return op, tiles.packing(op, int(facts["ZQ_GROUP"]), facts["ZQ_ASYM"] == "1", facts["ZQ_HALF"] == "1")


def make(op: str, p: layout.Packing, m: int, n: int, k: int, out: torch.dtype, bias: bool, seed: int) -> dict:
    """Random operands, the float64 product `exact`, and `terms`, the sum of the magnitudes of its terms."""
    g = torch.Generator(device="cuda").manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g, device="cuda")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, device="cuda") + 0.5

    case: dict = {"y": None}
    codes = integers(0, 16 if p.bits == 4 else 256, n, k).to(torch.uint8)
    if p.kind in ("w8a8", "fp8_block") and "fp8" in op:
        codes = torch.randn(n, k, generator=g, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
    groups = -(-k // p.group) if p.group else 0
    scale = offset = None
    if p.kind == "fp8_block":
        scale = uniform(-(-n // 128), -(-k // 128))
    elif p.kind == "w4a8_two":
        scale = integers(1, 17, n, groups).to(torch.uint8)
        offset = (integers(0, 256, n, groups) * (255 - 15 * scale.long()) // 255).to(torch.uint8)
    elif p.group:
        scale = uniform(n, groups).to(p.float16 if p.kind == "w4a16" else torch.float32)
        offset = integers(0, 16, n, groups).to(torch.uint8) if p.asym else None
    case["w"] = layout.pack(p, codes, scale, offset)

    def spread(x: Tensor) -> Tensor:
        return x.double().repeat_interleave(p.group, 1)[:, :k]

    if p.kind in ("w8a8", "fp8_block", "w8a16"):
        weight = codes.view(torch.float8_e4m3fn if "fp8" in op else torch.int8).double()
    elif p.kind == "w4a8_two":
        weight = codes.double() * spread(scale) + spread(offset) - 128
    else:
        weight = codes.double() - (8 if offset is None else spread(offset))
    if p.kind == "fp8_block":
        weight *= scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    elif p.group and p.kind != "w4a8_two":
        weight *= spread(scale)
        if p.kind == "w4a16":
            weight = weight.to(p.float16).double()

    x = torch.randn(m, k, generator=g, device="cuda")
    wide = p.act_bytes == 2
    x = x.to(p.float16) if wide else (x * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    if not wide and "fp8" not in op:
        x = integers(-128, 128, m, k).to(torch.int8)
    around = torch.full((m + 300, k), 127, dtype=torch.uint8 if not wide else torch.int16, device="cuda")
    around[:m] = x.view(around.dtype)
    case["x"] = around.view(x.dtype)[:m]
    value = x.double()
    if op == "fp8_block128":
        case["sx"] = uniform(m, -(-k // 128))
        value = value * case["sx"].double().repeat_interleave(128, 1)[:, :k]
    elif not wide:
        case["sx"] = uniform(m)
    if op == "w4a8_int8":
        case["rowsum"] = x.sum(-1, dtype=torch.int32)
    if p.kind in ("w8a8", "w4a8_two", "w8a16") or (p.group == 0 and p.kind != "fp8_block"):
        case["ws"] = uniform(n)
    if bias:
        case["bias"] = torch.randn(n, generator=g, device="cuda").to(out)
    case["exact"], case["terms"] = value @ weight.T, value.abs() @ weight.abs().T
    case["out"] = out
    return case


def verdict(op: str, case: dict, y: Tensor) -> str:
    """ "" when y is right: bit for bit where sums are integers, else within the error of float32 sums."""
    factor = torch.ones((), device="cuda")
    if "ws" in case and "sx" in case:
        factor = case["ws"] * case["sx"][:, None]
    elif "ws" in case:
        factor = case["ws"]
    elif "sx" in case and case["sx"].dim() == 1:
        factor = case["sx"][:, None]
    bias = case["bias"].float() if "bias" in case else torch.zeros((), device="cuda")
    right = (case["exact"].float() * factor + bias).to(case["out"])
    if op in ("w8a8_int8", "w4a8_int8"):
        wrong = (y != right) | y.isnan()
    else:
        tolerance = {"w8a8_fp8": 2e-3, "fp8_block128": 2e-3, "w4a8_fp8": 2e-3}.get(op, 1e-5)
        unit = 2.0**-8 if case["out"] == torch.bfloat16 else 2.0**-10
        exact = case["exact"] * factor + bias
        allowed = unit * exact.abs() + tolerance * case["terms"] * factor.abs() + 1e-30
        wrong = ~((y.double() - exact).abs() <= allowed)
    if not bool(wrong.any()):
        return ""
    at = wrong.nonzero()
    m, n = at[0].tolist()
    where = f"tokens {sorted(set(at[:, 0].tolist()))[:6]} rows {sorted(set(at[:, 1].tolist()))[:9]}"
    return f"{len(at)} of {wrong.numel()} wrong, first [{m},{n}] {y[m, n].item()} not {right[m, n].item()}; {where}"


def forced(op: str, p: layout.Packing, m: int, n: int, k: int, sms: int, family: int) -> Iterator[Config]:
    """What `choose` gives, and every other way to compute the same."""
    chosen = tiles.choose(op, m, n, k, group=p.group, arch=family, sms=sms, asym=p.asym, half=p.half)
    yield chosen
    steps = -(-k // layout.STEP)
    if family != 90:
        for split in (2, 3, 8):
            tile = next(t for t in tiles.tiles(op, p, family) if t.entry == chosen.entry)
            blocks = -(-n // 128) * -(-m // tile.tokens)
            zeroed = -(-blocks * 4 // 16) * 16
            size = zeroed + blocks * split * 128 * tile.tokens * 4
            yield replace(chosen, grid=(blocks, 1, split), split=split, workspace=size, zeroed=zeroed)
        return
    for tile, (cluster, split) in itertools.product(
        tiles.tiles(op, p, 90), ((1, 1), (2, 1), (2, 2), (4, 4), (8, 8))
    ):
        sharing = cluster // split
        if (sharing > 1 and tile.tokens < 16) or (split > 1 and (tile.tokens > 64 or steps < split)):
            continue
        if m > 16 * tile.tokens:
            continue
        config = tiles.persistent(op, p, tile, cluster, split, (m, n), sms)
        yield config if split > 1 else replace(config, grid=(min(config.grid[0], 16 * cluster), 1, 1))


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
    family = 90 if unit.source == "gemm_sm90.cu" else 0
    failures = cases = 0
    for seed, (m, n, k) in enumerate([*SHAPES, LARGE]):
        out = torch.float16 if (p.half if p.act_bytes == 2 else seed % 2) else torch.bfloat16
        case = make(op, p, m, n, k, out, bias=seed % 2 == 0, seed=seed)
        # 88: an architecture with FP8 in the sense of `choose`, whose kernel is the portable one
        for c in forced(op, p, m, n, k, sms, family or 89):
            c = replace(c, unit=unit.name)
            print(f"  {unit.name} {m}x{n}x{k} {c.entry} cluster {c.cluster} split {c.split} ...", end=" ", flush=True)
            wrong = verdict(op, case, run_case(driver, folder, c, arch, case, more))
            print(wrong or "ok", flush=True)
            failures += bool(wrong)
            cases += 1
    print(f"{'FAIL' if failures else 'PASS'} {unit.name}: {cases - failures} of {cases}", flush=True)
    return failures


def check(units: list[Unit], arguments: argparse.Namespace) -> None:
    def one(unit: Unit) -> None:
        command = [sys.executable, "-m", "tests.kernels.gpu_smoke", "child", str(arguments.folder), "--only"]
        command += [f"^{unit.name}$", "--arch", arguments.arch, *arguments.more]
        started = time.time()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
            lines, error = done.stdout.splitlines(), done.stderr.strip().splitlines()[-1:]
        except subprocess.TimeoutExpired as stuck:
            lines, error = (stuck.stdout or b"").decode().splitlines(), [f"no answer for {LIMIT} s"]
        bad = [line for line in lines if line.startswith("  ") and not line.endswith("... ok")]
        summary = [line for line in lines if not line.startswith("  ")] or [f"FAIL {unit.name}: {' '.join(error)}"]
        print("\n".join([*bad[:6], *summary]) + f"  ({time.time() - started:.0f} s)", flush=True)

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
    return replay([lambda case=case: gemm(driver, folder, c, arch, case) for case in cases])


def cublas(m: int, n: int, k: int) -> dict[str, float]:
    found = {}
    copies = max(2, -(-(512 << 20) // (n * k)))
    for kind in ("bf16", "int8", "fp8", "fp8 rows"):
        dtype = {"bf16": torch.bfloat16, "int8": torch.int8}.get(kind, torch.float8_e4m3fn)
        x = torch.randint(-9, 9, (m, k), device="cuda").to(torch.int8).to(torch.float32).to(dtype)
        ws = [torch.randint(-9, 9, (n, k), device="cuda").to(torch.float32).to(dtype) for _ in range(copies)]
        one = torch.ones(1, device="cuda")
        a, b = (one, one) if kind == "fp8" else (torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda"))

        def call(w: Tensor, kind: str = kind, x: Tensor = x, a: Tensor = a, b: Tensor = b) -> Tensor:
            if kind == "bf16":
                return x @ w.T
            if kind == "int8":
                return torch._int_mm(x, w.T)
            return torch._scaled_mm(x, w.T, scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=True)

        try:
            found[kind] = replay([lambda w=w: call(w) for w in ws])
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
                c = tiles.choose(op, m, n, k, group=p.group, arch=90 if "sm90" in unit.name else 89, sms=sms)
                try:
                    us = our_time(driver, folder, replace(c, unit=unit.name), arch, operands(op, p, m, n, k, copies))
                    cells.append(f"{us:9.1f} {b['bf16'] / us:5.2f}x")
                except RuntimeError as error:
                    cells.append(f"{str(error)[:15]:>16}")
            print(f"{unit.name:24}" + "".join(cells), flush=True)


def sweep(units: list[Unit], folder: Path, arch: str) -> None:
    driver, sms = Driver(), torch.cuda.get_device_properties(0).multi_processor_count
    for unit, (n, k), m in itertools.product(units, TIMED, TOKENS):
        op, p = scheme_of(unit)
        cases = operands(op, p, m, n, k, max(2, -(-(512 << 20) // layout.packed_bytes(p, n, k))))
        chosen = tiles.choose(op, m, n, k, group=p.group, arch=90, sms=sms)
        cells = []
        for tile, (cluster, split) in itertools.product(
            tiles.tiles(op, p, 90), ((1, 1), (2, 1), (4, 1), (2, 2), (4, 4))
        ):
            fits = split == 1 or (tile.tokens <= 64 and -(-n // 128) * -(-m // tile.tokens) * split <= 2 * sms)
            if tile.tokens > 4 * m + 8 or m > 64 * tile.tokens or (cluster > split and tile.tokens < 64) or not fits:
                continue
            c = tiles.persistent(op, p, tile, cluster, split, (m, n), sms)
            us = our_time(driver, folder, c, arch, cases)
            mark = "*" if (c.entry, c.cluster, c.split) == (chosen.entry, chosen.cluster, chosen.split) else ""
            cells.append((us, f"{tile.entry}/{cluster}/{split}{mark} {us:.1f}"))
        print(f"{unit.name} {m}x{n}x{k}: " + ", ".join(text for _, text in sorted(cells)), flush=True)


def ceiling(folder: Path, arch: str) -> None:
    driver, sms = Driver(), torch.cuda.get_device_properties(0).multi_processor_count
    data = torch.randint(0, 256, (1 << 18,), dtype=torch.uint8, device="cuda") & 0xBF  # no NaN in e4m3
    sink = torch.zeros(4, dtype=torch.int32, device="cuda")
    for kind, (name, tokens) in itertools.product(_ceilings(), (("n128", 128), ("n256", 256))):
        rounds = 20000
        c = Config(unit=kind.name, entry=name, grid=(sms, 1, 1), block=256, shared=tokens * 128)
        file = cubin_file(folder, kind.name, arch)
        us = replay([lambda c=c, file=file: driver.launch(file, c, [data, rounds, sink])], 3)
        operations = sms * 2 * 64 * tokens * 128 * 2 * rounds
        print(f"{kind.name} {name}: {operations / us / 1e6:.0f} Tera-operations/s", flush=True)


def _ceilings() -> list[Unit]:
    schemes = [("w4a8_int8", 128), ("w8a8_int8", 0), ("w8a8_fp8", 0)]
    return [
        replace(CEILING, name=f"ceiling_{op}", defines=macros(op, tiles.packing(op, group))) for op, group in schemes
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("build", "check", "child", "time", "sweep", "ceiling"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--only", default="sm90_")
    parser.add_argument("--portable", action="store_true", help="gemm_mma.cu on any architecture")
    arguments, arguments.more = parser.parse_known_args()
    prefix = "mma_" if arguments.portable else ""
    units = [u for u in GEMM_UNITS if re.search(arguments.only, u.name) and u.name.startswith(prefix)]
    if arguments.portable and arguments.only == "sm90_":
        units = [u for u in GEMM_UNITS if u.name.startswith("mma_")]
    folder, arch = arguments.folder, arguments.arch
    if arguments.command == "build":
        folder.mkdir(parents=True, exist_ok=True)
        for unit in [*units, *_ceilings()] if arch == "sm_90a" else units:
            cubin_file(folder, unit.name, arch, arguments.more).write_bytes(compile_unit(unit, arch, arguments.more))
            print(unit.name, flush=True)
    elif arguments.command == "child":
        sys.exit(check_unit(units[0], folder, arch, arguments.more) > 0)
    elif arguments.command == "check":
        check(units, arguments)
    elif arguments.command == "ceiling":
        ceiling(folder, arch)
    else:
        named = [u for u in units if u.name.split("_", 1)[1] in TIMED_UNITS]
        (timing if arguments.command == "time" else sweep)(named, folder, arch)


if __name__ == "__main__":
    main()
