"""Files of UTF-8 text, plain or compressed, and what goes wrong while one is read."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..common.errors import RecipeError

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

COMPRESSIONS = tuple(_DECOMPRESSORS)
"""Suffixes of compressed files."""


def is_compressed(path: Path) -> bool:
    """Tell by its name whether a file is compressed."""
    return path.suffix.lower() in _DECOMPRESSORS


def suffix_of(path: Path) -> str:
    """Return the suffix of what is in a file, in lower case: `.csv` of `a.CSV.gz`."""
    return Path(path.stem).suffix.lower() if is_compressed(path) else path.suffix.lower()


def open_bytes(path: Path) -> Any:
    """Open a file to read its bytes, decompressed."""
    return _DECOMPRESSORS[path.suffix.lower()](path, "rb") if is_compressed(path) else path.open("rb")


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a file of UTF-8 text; a byte-order mark at its start is no part of it. `newline` is that of `open`."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)


@contextlib.contextmanager
def reading_text(path: Path) -> Iterator[None]:
    """Turn what may go wrong while text is read into a RecipeError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); iconv -t UTF-8 converts text of another "
            "encoding"
        ) from error
    except _READ_ERRORS as error:
        raise RecipeError(f"cannot read {path}: {error}") from error


def beginning(path: Path, size: int) -> bytes:
    """Return the first bytes of a file, decompressed; none of one that cannot be: whoever reads it on will say so."""
    try:
        with open_bytes(path) as file:
            return bytes(file.read(size))
    except _READ_ERRORS:
        return b""
