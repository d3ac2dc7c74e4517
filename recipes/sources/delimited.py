"""Comma- and tab-separated tables with a header line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..common.errors import RecipeError
from .columns import require_one
from .compressed import open_text, reading_text

_LONGEST_FIELD = 2**26  # characters: a quote that is never closed makes one field of the rest of the file
_DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}


def read_delimited(path: Path, column: str, suffix: str) -> Iterator[str | None]:
    """Yield the text of each row of a .csv or .tsv file; it is empty where the row has none.

    The first line names the columns. Fields may be quoted with double quotes, which are doubled inside, and then hold
    line ends, which stay as they are. The fields of .csv are separated by commas, or by semicolons or tabs where that
    makes `column` one of the columns.

    Raises:
        RecipeError: no such column, or two; a row with more or fewer fields than the header; quotes that do not
            match; a column of numbers alone.
    """
    with reading_text(path):
        delimiter = _delimiter(path, column, _DELIMITERS[suffix])
        any_words, filled = False, 0
        for text in _fields(path, column, delimiter):
            if text.strip():
                filled += 1
                any_words = any_words or not _is_number(text)
            yield text
        if filled and not any_words:
            raise RecipeError(f"{path}: column {column!r} holds numbers and no text; choose another with --text_column")


def _fields(path: Path, column: str, delimiter: str) -> Iterator[str]:
    csv.field_size_limit(_LONGEST_FIELD)
    with open_text(path, newline="") as file:
        rows = csv.reader(_without_nul(path, file), delimiter=delimiter, strict=True)
        try:
            header = next(rows, None)
            if header is None:
                return
            place = header.index(column)
            for row in rows:
                if row:
                    yield _field(row, place, header, f"{path}, line {rows.line_num}")
        except csv.Error as error:
            raise RecipeError(
                f"{path}, line {rows.line_num}: not a table: {error}; quotes inside a quoted field are doubled "
                '(""), and one that is opened has to be closed'
            ) from error


def _field(row: Sequence[str], place: int, header: Sequence[str], where: str) -> str:
    if len(row) != len(header):
        raise RecipeError(
            f"{where}: a row of {len(row)} fields under a header of {len(header)}; a field that holds the separator "
            "or a line end has to be quoted"
        )
    return row[place]


def _delimiter(path: Path, column: str, allowed: Sequence[str]) -> str:
    """Return the first of the separators with which the header has the column."""
    headers = {}
    for delimiter in allowed:
        with open_text(path, newline="") as file:
            try:
                headers[delimiter] = next(csv.reader(_without_nul(path, file), delimiter=delimiter), None)
            except csv.Error as error:
                raise RecipeError(f"{path}, line 1: not a table: {error}") from error
        header = headers[delimiter]
        if header is None:  # of an empty file
            return delimiter
        if column in header:
            require_one(header, column, f"the header of {path}")
            return delimiter
    most = max(headers.values(), key=lambda header: len(header or ()))
    require_one(most or (), column, f"the first line of {path}, which has to name the columns,")
    return allowed[0]


def _without_nul(path: Path, lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise RecipeError(f"{path} is not text: it has NUL bytes")
        yield line


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
