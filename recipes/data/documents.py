"""Documents from files, globs and Hugging Face data sets, one at a time."""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..common.errors import RecipeError, kind_of

_DOCUMENT_CHARACTERS = 4000
_ROWS_AT_ONCE = 256  # of a Parquet file: rows may be whole books
HUB_PREFIX = "hf:"
_READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)


def _open_zstandard(path: Path, mode: str) -> io.BufferedIOBase:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


_DECOMPRESSORS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def expand_sources(sources: Sequence[str]) -> list[str]:
    """Turn files, globs and `hf:` names into an ordered list of existing files and `hf:` names.

    Raises:
        RecipeError: a file or glob matches nothing, is a folder, or cannot be opened.
    """
    expanded: list[str] = []
    for source in sources:
        if source.startswith(HUB_PREFIX):
            expanded.append(source)
            continue
        matches = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else [source]
        files = [match for match in matches if not Path(match).is_dir()]
        if not files and Path(source).is_dir():
            raise RecipeError(
                f"--data {source!r} is a folder; give files or a glob, e.g. {source.rstrip('/')}/*.txt, or a folder "
                "that `prepare` has written"
            )
        if not files:
            raise RecipeError(f"--data {source!r} matches no file; give files, globs, or {HUB_PREFIX}NAME")
        for file in files:
            _check_readable(file)
        expanded.extend(files)
    return expanded


def read_documents(sources: Iterable[str], text_column: str) -> Iterator[str]:
    """Yield the documents of expanded sources in order; see `read_source`."""
    for source in sources:
        yield from read_source(source, text_column)


def read_source(source: str, text_column: str) -> Iterator[str]:
    """Yield the documents of one file or `hf:` data set in order, holding one at a time (256 of Parquet).

    .jsonl and .json hold one JSON object per line, .parquet a table, both with the text in `text_column`; anything
    else is UTF-8 text, in which runs of paragraphs (separated by blank lines) make up documents of about
    4,000 characters; longer paragraphs are cut at line ends, longer lines at spaces. Records whose text is null or
    empty are skipped. Text and JSON Lines may be compressed: .gz, .bz2, .xz, .zst. A data set is streamed.

    Raises:
        RecipeError: unreadable or malformed data, named with its file and line; a missing column (columns listed).
    """
    if source.startswith(HUB_PREFIX):
        yield from _read_hub(source.removeprefix(HUB_PREFIX), text_column)
        return
    path = Path(source)
    kind = Path(path.stem).suffix if path.suffix in _DECOMPRESSORS else path.suffix
    if kind in (".jsonl", ".json"):
        yield from _read_json_lines(path, text_column)
    elif kind == ".parquet":
        yield from _read_parquet(path, text_column)
    else:
        yield from _read_text(path)


def _open_text(path: Path) -> TextIO:
    """Open a plain or compressed UTF-8 file."""
    if path.suffix in _DECOMPRESSORS:
        return io.TextIOWrapper(_DECOMPRESSORS[path.suffix](path, "rb"), encoding="utf-8")
    return path.open(encoding="utf-8")


def _check_readable(file: str) -> None:
    try:
        with open(file, "rb"):
            pass
    except FileNotFoundError as error:
        raise RecipeError(f"--data {file!r} does not exist; give files, globs, or {HUB_PREFIX}NAME") from error
    except OSError as error:
        raise RecipeError(f"--data {file!r} cannot be read: {error.strerror}") from error


def _read_text(path: Path) -> Iterator[str]:
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
    try:
        with _open_text(path) as file:
            for line in _lines(file):
                if "\0" in line:
                    raise RecipeError(
                        f"{path} is not text: it has NUL bytes; UTF-8 text, .jsonl and .parquet can be read"
                    )
                if line.strip():
                    lines.append(line.rstrip())
                    size += len(line)
                if lines and (size >= _DOCUMENT_CHARACTERS or not line.strip()):
                    yield "\n".join(lines)
                    lines, size = [], 0
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); text, .jsonl and .parquet can be read"
        ) from error
    except _READ_ERRORS as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
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


def _read_json_lines(path: Path, column: str) -> Iterator[str]:
    number = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                text = _text_of(json.loads(line), column, f"{path}, line {number}") if line.strip() else None
                if text:
                    yield text
    except RecipeError:
        raise
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{path} is not JSON Lines (one object per line): {error.msg}, line {number} column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not JSON Lines (one object per line): {error}") from error
    except _READ_ERRORS as error:
        raise RecipeError(f"cannot read {path}: {error}") from error


def _text_of(record: Any, column: str, where: str) -> str | None:
    """Return the text of a record; None where the column holds null, as tables have it for "no text"."""
    if not isinstance(record, dict):
        raise RecipeError(f"{where}: expected a JSON object, found {kind_of(record)}")
    if column not in record:
        raise RecipeError(f"{where}: no column {column!r}; {_column_hint(list(record))}")
    if not isinstance(record[column], str | None):
        found = kind_of(record[column])
        raise RecipeError(f"{where}: column {column!r} holds {found} and no text; {_column_hint(list(record))}")
    text: str | None = record[column]
    return text


def _column_hint(columns: Sequence[str]) -> str:
    listed = ", ".join(map(str, columns))
    return f"columns: {listed}; choose one with --text_column NAME (prepare) or data.text_column=NAME (recipe)"


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        if column not in columns:
            raise RecipeError(f"{path} has no column {column!r}; {_column_hint(columns)}")
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[column]):
            yield from (str(text) for text in batch.column(0).to_pylist() if text)
    except (OSError, pyarrow.ArrowException) as error:
        raise RecipeError(f"cannot read {path} as Parquet: {error}") from error


def _read_hub(name: str, column: str) -> Iterator[str]:
    """Stream `NAME`, `NAME:CONFIGURATION`, either with `@SPLIT` (default: train)."""
    import datasets

    path, _, split = name.partition("@")
    path, _, configuration = path.partition(":")
    with _hub_errors(name):
        data = iter(datasets.load_dataset(path, configuration or None, split=split or "train", streaming=True))
    while True:
        with _hub_errors(name):
            record = next(data, None)
        if record is None:
            return
        if column not in record:
            raise RecipeError(f"data set {name!r} has no column {column!r}; {_column_hint(list(record))}")
        if record[column]:
            yield str(record[column])


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub client raises many unrelated classes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RecipeError(
            f"cannot load the Hugging Face data set {name!r}: {reason[0]} (without a network, give files with --data)"
        ) from error
