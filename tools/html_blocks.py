"""The readable text of an HTML page as blocks, for build_texts.py: no navigation, tables or markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

Block = tuple[str, str]  # kind (text | item | code), text


class Page(HTMLParser):
    """The readable blocks of the first element `tag` that has `attribute` (None: any)."""

    BLOCKS = frozenset(
        [
            "p",
            "div",
            "li",
            "dt",
            "dd",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "pre",
            "blockquote",
            "section",
            "ul",
            "ol",
            "dl",
            "tr",
        ]
    )
    SKIP_TAGS = frozenset(["script", "style", "table", "nav", "button", "svg"])
    SKIP_CLASSES = frozenset(
        [
            "headerlink",
            "navheader",
            "navfooter",
            "toc",
            "boring",
            "footnotes",
            "footnote-reference",
            "linenos",
            "buttons",
            "versionmodified",
            "footnote",
            "nav-chapters",
        ]
    )

    def __init__(self, tag: str, attribute: tuple[str, str] | None) -> None:
        super().__init__(convert_charrefs=True)
        self.tag, self.attribute = tag, attribute
        self.blocks: list[Block] = []
        self.depth = 0  # of nested elements named like the one that is read
        self.skipped: tuple[str, int] | None = None  # (tag, depth) of what is left out
        self.text: list[str] = []
        self.kind = "text"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.depth == 0:
            if tag == self.tag and (self.attribute is None or self.attribute in attrs):
                self.depth = 1
            return
        self.depth += tag == self.tag
        if self.skipped:
            name, count = self.skipped
            self.skipped = (name, count + (tag == name))
            return
        classes = (dict(attrs).get("class") or "").split()
        if tag in self.SKIP_TAGS or self.SKIP_CLASSES.intersection(classes):
            self.skipped = (tag, 1)
            return
        if tag == "br":
            self.text.append("\n")
        if tag in self.BLOCKS:
            self.flush()
            self.kind = {"pre": "code", "li": "item"}.get(tag, self.kind)

    def handle_endtag(self, tag: str) -> None:
        if self.depth == 0:
            return
        self.depth -= tag == self.tag
        if self.skipped:
            name, count = self.skipped
            count -= tag == name
            self.skipped = (name, count) if count else None
        elif tag in self.BLOCKS or self.depth == 0:
            self.flush()
            self.kind = "text"

    def handle_data(self, data: str) -> None:
        if self.depth and not self.skipped:
            self.text.append(data)

    def flush(self) -> None:
        """Close the block that is being read."""
        raw = "".join(self.text)
        self.text = []
        if self.kind == "code":
            lines = [line.rstrip() for line in raw.replace("\t", "    ").split("\n")]
            text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        else:
            text = re.sub(r"^(\d+\.)+\s+|^Chapter \d+\.\s+", "", " ".join(raw.split()))
        if text.strip():
            self.blocks.append((self.kind, text))
            if self.kind == "item":
                self.kind = "text"  # what follows in the same list item is no new item


def read_html(
    root: Path, pattern: str, tag: str, attribute: tuple[str, str] | None
) -> Iterator[tuple[str, list[Block]]]:
    """(path below root without suffix, blocks) of every page that matches, in order of name."""
    for path in sorted(root.glob(pattern)):
        page = Page(tag, attribute)
        page.feed(path.read_text(encoding="utf-8"))
        yield path.relative_to(root).with_suffix("").as_posix(), page.blocks
