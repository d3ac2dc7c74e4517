"""Parquet files and Arrow files of either form, which `datasets` and Feather write."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError
from .columns import column_hint, require_one

_ROWS_AT_ONCE = 256  # rows may be whole books
_FILE_FORM = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_TEXT = re.compile(r"(large_)?string(_view)?|null")  # null: a column without a single text


def read_parquet(path: Path, column: str) -> Iterator[str | None]:
    """Yield the text of each row of a Parquet file, None where it is null."""
    import pyarrow.parquet

    with _reading(path, "Parquet"):
        table = pyarrow.parquet.ParquetFile(path)
        _require_text(table.schema_arrow, column, path)
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[column]):
            # By its name: columns=["a.b"] gives a field b of a struct a too, before a column of that name.
            _require_text(batch.schema, column, path)
            yield from _texts(batch.column(column))


def read_arrow(path: Path, column: str) -> Iterator[str | None]:
    """Yield the text of each row of an Arrow file, None where it is null; nothing of one without a byte."""
    import pyarrow

    if path.stat().st_size == 0:
        return
    with _reading(path, "Arrow"), pyarrow.memory_map(str(path)) as file:
        for batch in _batches(path, file, column):
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from _texts(batch.column(column).slice(start, _ROWS_AT_ONCE))


def _batches(path: Path, file: Any, column: str) -> Iterator[Any]:
    """Yield the batches of the file form, whose end holds a table of them, or of the stream form."""
    import pyarrow

    if file.read(len(_FILE_FORM)) == _FILE_FORM:
        file.seek(0)
        reader = pyarrow.ipc.open_file(file)
        _require_text(reader.schema, column, path)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
        return
    # Without this mark a file that was cut between two batches would read as a shorter one.
    file.seek(max(0, file.size() - len(_END_OF_STREAM)))
    if file.read() != _END_OF_STREAM:
        raise RecipeError(f"cannot read {path} as Arrow: its end is missing; copy or write it anew")
    file.seek(0)
    reader = pyarrow.ipc.open_stream(file)
    _require_text(reader.schema, column, path)
    yield from reader


def _texts(column: Any) -> list[str | None]:
    column.validate(full=True)  # offsets that point elsewhere would be followed
    texts: list[str | None] = column.to_pylist()
    return texts


def _require_text(schema: Any, column: str, path: Path) -> None:
    require_one(schema.names, column, str(path))
    kind = schema.field(column).type
    value = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
    if not _TEXT.fullmatch(str(value)):
        raise RecipeError(f"{path}: column {column!r} holds {kind} and no text; {column_hint(schema.names)}")


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except RecipeError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise RecipeError(f"cannot read {path} as {kind}: {error}") from error
