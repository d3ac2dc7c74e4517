"""Plain text, cut into documents at blank lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ..common.errors import RecipeError
from .compressed import open_text, reading_text

_DOCUMENT_CHARACTERS = 4000


def read_text(path: Path) -> Iterator[str]:
    """Yield documents of about 4,000 characters: runs of paragraphs; long ones are cut, see `_paragraphs`."""
    parts: list[str] = []
    size = 0
    for paragraph in _paragraphs(path):
        parts.append(paragraph)
        size += len(paragraph)
        if size >= _DOCUMENT_CHARACTERS:
            yield "\n\n".join(parts)
            parts, size = [], 0
    if parts:
        yield "\n\n".join(parts)


def _paragraphs(path: Path) -> Iterator[str]:
    """Yield paragraphs; of a long one, several pieces that end with a line, so that memory holds none as a whole."""
    lines: list[str] = []
    size = 0
    with reading_text(path), open_text(path) as file:
        for line in _lines(file):
            if "\0" in line:
                raise RecipeError(f"{path} is not text: it has NUL bytes; UTF-8 text can be read, and tables")
            if line.strip():
                lines.append(line.rstrip())
                size += len(line)
            if lines and (size >= _DOCUMENT_CHARACTERS or not line.strip()):
                yield "\n".join(lines)
                lines, size = [], 0
    if lines:
        yield "\n".join(lines)


def _lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of a file, over-long ones in pieces that end at a space if there is one."""
    rest = ""
    while read := file.readline(_DOCUMENT_CHARACTERS):
        line, rest = rest + read, ""
        if len(line) >= _DOCUMENT_CHARACTERS and not line.endswith("\n"):
            end = line.rfind(" ") + 1 or len(line)
            line, rest = line[:end], line[end:]
        yield line
    if rest:
        yield rest
