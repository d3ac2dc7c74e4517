"""Writes lists as Python-Markdown reads them, so that a page looks here as in every other reader of Markdown.

Elsewhere (CommonMark) a list may follow a paragraph without an empty line, and what belongs to an item stands under its
text, two or three columns in. Python-Markdown wants the empty line, and four columns per level.
"""

from __future__ import annotations

import re
from typing import Any

ITEM = re.compile(r" *(?:[-*+]|\d{1,9}[.)]) +(?=\S)")
INTERRUPTS_A_PARAGRAPH = re.compile(r" *(?:[-*+]|1[.)]) ")
FENCE = re.compile(r" *(`{3,}|~{3,})")
NEVER_CONTINUES = re.compile(r" {0,3}(?:#|<!--|>|`{3}|~{3})")
"""Lines that end a paragraph of an item, where they stand further left than it."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    return as_python_markdown_reads(markdown)


def as_python_markdown_reads(text: str) -> str:
    """Return the same page with empty lines before lists, and four columns for each level of them."""
    written: list[str] = []
    columns: list[int] = []  # where the text of each open item begins
    fence, shift, before = "", 0, ""
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        if fence:
            written.append(shifted(line, shift))
            fence = "" if line.strip() == fence else fence
            continue
        if line.strip():
            item, within = ITEM.match(line), bool(columns)
            if item or not before.strip() or NEVER_CONTINUES.match(line):
                columns = [column for column in columns if column <= indent]
            if indent >= (columns[-1] if columns else 0) + 4:
                item = None  # code
            shift = 4 * len(columns) - (columns[-1] if columns else 0)
            if item and before.strip() and after_text(written) and (within or INTERRUPTS_A_PARAGRAPH.match(line)):
                written.append("")
            if item:
                columns.append(item.end())
            if opened := FENCE.match(line):
                fence = opened[1]
        written.append(shifted(line, shift))
        before = line
    return "\n".join(written)


def after_text(written: list[str]) -> bool:
    """Whether the last lines are a paragraph that begins with no item."""
    for earlier in reversed(written):
        if ITEM.match(earlier):
            return False
        if not earlier.strip():
            break
    return True


def shifted(line: str, columns: int) -> str:
    """A line so many columns further right; or left, as far as it is empty."""
    if columns >= 0:
        return " " * columns + line if line.strip() else line
    return line[min(-columns, len(line) - len(line.lstrip(" "))) :]
