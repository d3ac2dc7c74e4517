"""JSON Lines: one object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError
from .columns import text_of
from .compressed import open_text, reading_text

_OPENINGS = {"[": "jq -c '.[]'", "{": "jq -c ."}
"""How the first line of JSON that is no JSON Lines may begin, and what makes lines of it."""


def read_json_lines(path: Path, column: str) -> Iterator[str | None]:
    """Yield the text of each line's object, None where it is null; blank lines are no records."""
    number, line = 0, ""
    try:
        with reading_text(path), open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text(json.loads(line), column, path, number)
    except RecipeError:
        raise
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{path} is not JSON Lines (one object per line): {error.msg}, line {number} column {error.colno}"
            f"{_remedy(path, number, line)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not JSON Lines (one object per line): {error}") from error


def _text(record: Any, column: str, path: Path, number: int) -> str | None:
    where = f"{path}, line {number}"
    if isinstance(record, list):
        raise RecipeError(f"{where}: expected a JSON object, found a list{_remedy(path, number, '[')}")
    return text_of(record, column, where)


def _remedy(path: Path, number: int, line: str) -> str:
    command = _OPENINGS.get(line.lstrip()[:1]) if number == 1 else None
    return f"; if it is JSON over several lines or an array, {command} {path.name} makes lines of it" if command else ""
