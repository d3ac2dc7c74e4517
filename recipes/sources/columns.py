"""The column of a table that holds the text, whatever the table is stored as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..common.errors import RecipeError, cut, kind_of

_SHOWN = 300  # characters of the list of columns: the first line of a table without a header may be a page of text


def text_of(record: Any, column: str, where: str) -> str | None:
    """Return the text of a record; None where the column holds null, as tables have it for "no text".

    Raises:
        RecipeError: the record is no object, lacks the column, or holds something else in it; `where` is named.
    """
    if not isinstance(record, Mapping):
        raise RecipeError(f"{where}: expected a JSON object, found {kind_of(record)}")
    if column not in record:
        raise RecipeError(f"{where}: no column {column!r}; {column_hint(list(record))}")
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise RecipeError(f"{where}: column {column!r} holds {kind_of(text)} and no text; {column_hint(list(record))}")
    return None if text is None else _without_lone_surrogates(text)


def _without_lone_surrogates(text: str) -> str:
    """Put U+FFFD for the halves of characters that JSON may escape, as of an emoji that was cut: no text has them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def require_one(columns: Sequence[str], column: str, where: str) -> None:
    """Check that a table has the column once.

    Raises:
        RecipeError: it has none, or several of that name; all columns are listed.
    """
    if column not in columns:
        raise RecipeError(f"{where} has no column {column!r}; {column_hint(columns)}")
    if (count := list(columns).count(column)) > 1:
        raise RecipeError(f"{where} has {count} columns called {column!r}: give them different names")


def column_hint(columns: Sequence[str]) -> str:
    """Return the end of a message about columns: which there are, and how to choose one."""
    listed = cut(", ".join(map(str, columns)), _SHOWN)
    return f"columns: {listed}; choose one with --text_column NAME (prepare) or data.text_column=NAME (recipe)"
