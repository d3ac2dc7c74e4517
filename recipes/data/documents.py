"""Documents from files, globs, folders and Hugging Face data sets, one at a time."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common.errors import RecipeError
from ..sources import bert_shards
from ..sources.arrow_tables import read_arrow, read_parquet
from ..sources.compressed import is_compressed, suffix_of
from ..sources.delimited import read_delimited
from ..sources.foreign import refusal, wholly_compressed
from ..sources.hub import HubName, read_hub
from ..sources.json_lines import read_json_lines
from ..sources.plain_text import read_text
from ..sources.saved_folders import folder_refusal, saved_files

HUB_PREFIX = "hf:"

Document = str | NDArray[np.int64]
"""Text, or the sample of a shard that holds token ids, see `read_bert_shard`."""

TEXT, TOKENS, LINES, DELIMITED, ARROW, PARQUET = "text", "token ids", "JSON Lines", "delimited", "Arrow", "Parquet"

_KINDS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), LINES),
    **dict.fromkeys((".csv", ".tsv"), DELIMITED),
    **dict.fromkeys((".arrow", ".feather"), ARROW),
    ".parquet": PARQUET,
    **dict.fromkeys(bert_shards.SUFFIXES, TOKENS),
}
_COMPRESSED_INSIDE = (ARROW, PARQUET, TOKENS)
READ_SINCE_FORMAT_3 = (".ndjson", ".csv", ".tsv", ".arrow", ".feather", *bert_shards.SUFFIXES)
"""Suffixes of files that were once taken for plain text: what was prepared of them then is not what it is now."""


def kind_of_file(path: Path) -> str:
    """Return by its name what a file is read as: plain text if nothing else."""
    return _KINDS.get(suffix_of(path), TEXT)


def expand_sources(sources: Sequence[str]) -> list[str]:
    """Turn files, globs, folders of `save_to_disk` and `hf:` names into an ordered list of files and `hf:` names.

    Raises:
        RecipeError: a file or glob matches nothing, is another folder, or cannot be opened; a name that is none.
    """
    expanded: list[str] = []
    for source in sources:
        files = [source] if source.startswith(HUB_PREFIX) else _files_of(source)
        for file in files:
            if file.startswith(HUB_PREFIX):
                HubName.parse(file.removeprefix(HUB_PREFIX)).check()
            else:
                _check_readable(file)
        expanded.extend(files)
    return expanded


def _files_of(source: str) -> list[str]:
    if Path(source).is_dir():
        files = saved_files(Path(source))
        if files is None:
            raise RecipeError(folder_refusal(source, HUB_PREFIX))
        return files
    matches = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else [source]
    files = [match for match in matches if not Path(match).is_dir()]
    if not files:
        raise RecipeError(f"--data {source!r} matches no file; give files, globs, or {HUB_PREFIX}NAME")
    return files


def check_format(source: str) -> None:
    """Check that a file or `hf:` name is of a format that is read, as far as its name and first bytes tell.

    Raises:
        RecipeError: says what it is and how to convert it.
    """
    if source.startswith(HUB_PREFIX):
        return
    path = Path(source)
    kind = kind_of_file(path)
    if kind in _COMPRESSED_INSIDE and is_compressed(path):
        raise RecipeError(wholly_compressed(path))
    if kind == TEXT and (reason := refusal(path)) is not None:
        raise RecipeError(reason)


def length_of(document: Document) -> int:
    """Return the characters of a text, or the tokens of a sample (2, tokens)."""
    return len(document) if isinstance(document, str) else document.shape[1]


def read_documents(sources: Iterable[str], text_column: str) -> Iterator[Document]:
    """Yield the documents of expanded sources in order; see `read_source`."""
    for source in sources:
        yield from read_source(source, text_column)


def read_source(source: str, text_column: str) -> Iterator[Document]:
    """Yield the documents of one file or `hf:` data set in order; see `read_records`, whose None are left out."""
    for document in read_records(source, text_column):
        if document is not None and length_of(document):
            yield document


def read_records(source: str, text_column: str) -> Iterator[Document | None]:
    """Yield what one file or `hf:` data set holds in order, holding one document at a time (256 of tables).

    .jsonl, .json and .ndjson hold one JSON object per line; .csv and .tsv a header line and rows; .parquet, .arrow
    and .feather a table; a data set is streamed. All have the text in `text_column`, and a record without text is
    None or empty. .hdf5 and .h5 are shards of token ids. Anything else is UTF-8 text, in which runs of paragraphs
    (separated by blank lines) make up documents of about 4,000 characters; longer paragraphs are cut at line ends,
    longer lines at spaces. Text of all kinds may be compressed: .gz, .bz2, .xz, .zst.

    Raises:
        RecipeError: unreadable or malformed data, named with its file and line; a missing column (columns listed).
    """
    if source.startswith(HUB_PREFIX):
        return read_hub(source.removeprefix(HUB_PREFIX), text_column)
    check_format(source)
    path = Path(source)
    kind = kind_of_file(path)
    if kind == LINES:
        return read_json_lines(path, text_column)
    if kind == DELIMITED:
        return read_delimited(path, text_column, suffix_of(path))
    if kind == PARQUET:
        return read_parquet(path, text_column)
    if kind == ARROW:
        return read_arrow(path, text_column)
    return bert_shards.read_bert_shard(path) if kind == TOKENS else read_text(path)


def _check_readable(file: str) -> None:
    try:
        with open(file, "rb"):
            pass
    except FileNotFoundError as error:
        raise RecipeError(f"--data {file!r} does not exist; give files, globs, or {HUB_PREFIX}NAME") from error
    except OSError as error:
        raise RecipeError(f"--data {file!r} cannot be read: {error.strerror}") from error
