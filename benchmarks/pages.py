"""Every table of results by its name, and the pages that hold them.

In a page, what stands between `<!-- table: FILE.json NAME -->` and `<!-- end -->` is the table NAME of
benchmarks/results/FILE.json, or of the lines of a sweep (FILE.jsonl.gz).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import kernel_tables
import sweep_tables
import tables

RESULTS = Path(__file__).parent / "results"
MARKED = re.compile(r"(<!-- table: (\S+) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "methods": lambda document: tables.accuracy(document, "methods"),
    "ablation": lambda document: tables.accuracy(document, "ablation"),
    "scales": lambda document: tables.accuracy(document, "scales"),
    "peers": lambda document: tables.accuracy(document, "peers"),
    "depth": lambda document: tables.memory(document, "depth"),
    "states": lambda document: tables.memory(document, "states"),
    "large": tables.large,
    "encoder": tables.encoder,
    "engines": tables.engines,
    "optim": tables.optim,
    "optim-speed": tables.optim_speed,
    "optim-block": tables.optim_block,
    "integer": tables.integer,
    "variance": tables.variance,
    "gradients": tables.gradients,
    "products": kernel_tables.products,
    "activations": kernel_tables.activations,
    "ceiling": kernel_tables.ceilings,
}


def all_tables(document: dict[str, Any]) -> str:
    """Every table that the document has rows of."""
    names = dict.fromkeys(row["table"] for row in document["rows"])
    return "\n".join(TABLES[name](document) for name in names)


def tables_of(file: Path) -> dict[str, Callable[[], str]]:
    """Every table of a file of results, by name."""
    if file.suffix == ".gz":
        lines = sweep_tables.read(file)
        return {name: partial(table, lines) for name, table in sweep_tables.TABLES.items()}
    document = json.loads(file.read_text(encoding="utf-8"))
    names = dict.fromkeys(row["table"] for row in document["rows"])
    return {name: partial(TABLES[name], document) for name in names}


def refreshed(page: str, results: Path = RESULTS) -> str:
    """The page with every marked table as the results have it. Exits when a file or a table is missing."""

    def table(found: re.Match[str]) -> str:
        begin, file, name, end = found.groups()
        try:
            made = tables_of(results / file)
        except OSError as error:
            raise SystemExit(f"the page names {file}: {error}") from None
        if name not in made:
            raise SystemExit(f"{file} has no rows of the table {name}")
        return f"{begin}\n{made[name]()}\n{end}"

    return MARKED.sub(table, page)
