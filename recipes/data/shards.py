"""Token streams on disk: shards of ids, written whole, mapped into memory, and cut into rows of any length.

A folder holds, per split, files of unsigned ids (`train-00000.bin`, ...): the documents' tokens with a separator after
each. Joined in order they are one stream, and a row of length L is L - 2 consecutive tokens of it, so that another
sequence length needs no other files. `manifest.json` names the files with their lengths and hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import RecipeError
from ..common.files import WRITING, read_sealed, whole_file, write_sealed
from ..common.marks import hash_of
from ..common.progress import PROGRESS
from .given_masks import original

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
_COUNTED_AT_ONCE = 1 << 20  # tokens, of which counting makes 64-bit copies


class BrokenShard(RecipeError):
    """A file of a prepared folder is missing, cut short or not what was written; the message names it."""


@dataclass(frozen=True)
class TokenFile:
    """One file of a stream: its name in the folder, number of tokens, and SHA-256."""

    name: str
    tokens: int
    sha256: str

    def check(self, folder: Path, dtype: np.dtype, contents: bool = False) -> None:
        """Compare the file with what it should be: its size, and its hash if `contents`.

        Raises:
            BrokenShard: they differ, or the file cannot be read.
        """
        path = folder / self.name
        expected = self.tokens * dtype.itemsize
        try:
            size = path.stat().st_size
            if size != expected:
                raise _broken(path, f"has {size:,} bytes instead of {expected:,}")
            if contents and hash_of(path) != self.sha256:
                raise _broken(path, "does not have the content that was written")
        except OSError as error:
            raise _broken(path, f"cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class Shard:
    """A part of the documents: their tokens per split, the text's length, and the number of documents per split."""

    number: int
    files: dict[str, TokenFile]
    documents: dict[str, int]
    characters: int


class TokenRows:
    """Rows (rows, length) over the files of one split: the classification token, length - 2 tokens, a separator.

    Indexing with an array of row numbers returns (numbers, length) ids. Files are mapped into memory at first use and
    never copied as a whole. The last, incomplete row of the stream is dropped.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[TokenFile],
        dtype: np.dtype,
        length: int,
        cls_id: int,
        sep_id: int,
        vocabulary_size: int,
        given_masks: bool = False,
    ) -> None:
        """Read `files` of `folder`, ids of `dtype` below `vocabulary_size`, in rows of `length` tokens.

        With `given_masks` each number holds an id and the mask that its source gave it.
        """
        self.folder = folder
        self.files = [file for file in files if file.tokens]
        self.dtype = dtype
        self.length = length
        self.cls_id, self.sep_id, self.vocabulary_size = cls_id, sep_id, vocabulary_size
        self.given_masks = given_masks
        self._ends = np.cumsum([file.tokens for file in self.files], dtype=np.int64)
        self._mapped: dict[int, NDArray[np.unsignedinteger]] = {}
        self._written: list[int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows, and tokens per row."""
        tokens = int(self._ends[-1]) if len(self._ends) else 0
        return tokens // (self.length - 2), self.length

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
        """Return the rows with these numbers.

        Raises:
            BrokenShard: a file that they lie in is missing, cut short or holds ids outside the vocabulary.
        """
        packed = self.with_masks(rows)
        return original(packed) if self.given_masks else packed

    def with_masks(self, rows: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
        """Return the rows as they are stored: with `given_masks` each number is an id and its mask; errors as above."""
        body = self.length - 2
        packed = np.empty((len(rows), self.length), dtype=self.dtype)
        packed[:, 0], packed[:, -1] = self.cls_id, self.sep_id
        starts = np.asarray(rows, dtype=np.int64) * body
        first = np.searchsorted(self._ends, starts, side="right")
        last = np.searchsorted(self._ends, starts + body - 1, side="right")
        whole = first == last
        for number in np.unique(first[whole]).tolist():
            inside = np.flatnonzero(whole & (first == number))
            local = starts[inside] - self._begin(number)
            packed[inside, 1:-1] = self._checked(number, self._tokens(number)[local[:, None] + np.arange(body)])
        for row in np.flatnonzero(~whole).tolist():
            packed[row, 1:-1] = self._across(int(starts[row]), body)
        return packed

    def check(self) -> None:
        """Compare the sizes of all files with what they should be; raises BrokenShard."""
        for file in self.files:
            file.check(self.folder, self.dtype)

    def pin(self) -> None:
        """From now on refuse files that are written anew; raises BrokenShard if one is missing."""
        self._written = [self._time_of(number) for number in range(len(self.files))]

    def counts(self) -> NDArray[np.int64]:
        """Count every id of the stream."""
        counts = np.zeros(self.vocabulary_size, dtype=np.int64)
        for number, file in enumerate(self.files):
            for start in range(0, file.tokens, _COUNTED_AT_ONCE):
                piece = self._checked(number, self._tokens(number)[start : start + _COUNTED_AT_ONCE])
                ids = original(piece) if self.given_masks else piece
                counts += np.bincount(ids, minlength=self.vocabulary_size)
                PROGRESS.move()
            self._mapped.pop(number, None)  # its pages would stay part of this process's memory
        return counts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}  # a worker process maps the files itself

    def _time_of(self, number: int) -> int:
        path = self.folder / self.files[number].name
        try:
            return path.stat().st_mtime_ns
        except OSError as error:
            raise _broken(path, f"cannot be read ({error.strerror})") from error

    def _begin(self, number: int) -> int:
        return int(self._ends[number]) - self.files[number].tokens

    def _across(self, start: int, count: int) -> NDArray[np.unsignedinteger]:
        """Return `count` tokens from `start` on that lie in several files."""
        pieces = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            local = start - self._begin(number)
            piece = self._checked(number, self._tokens(number)[local : local + count])
            pieces.append(piece)
            start, count, number = start + len(piece), count - len(piece), number + 1
        return np.concatenate(pieces)

    def _tokens(self, number: int) -> NDArray[np.unsignedinteger]:
        # The size is looked at on every read: touching a mapped page that a file no longer has kills the process.
        self.files[number].check(self.folder, self.dtype)
        if self._written is not None and self._time_of(number) != self._written[number]:
            raise _broken(self.folder / self.files[number].name, "was written anew while it was in use")
        if number not in self._mapped:
            self._mapped[number] = np.memmap(self.folder / self.files[number].name, dtype=self.dtype, mode="r")
        return self._mapped[number]

    def _checked(self, number: int, ids: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
        largest = int((original(ids) if self.given_masks else ids).max(initial=0))
        if largest >= self.vocabulary_size:
            path = self.folder / self.files[number].name
            raise _broken(path, f"holds the id {largest}, beyond the vocabulary of {self.vocabulary_size:,}")
        return ids


def write_shard(
    folder: Path,
    number: int,
    streams: Mapping[str, Iterable[NDArray[np.unsignedinteger]]],
    documents: Mapping[str, int],
    characters: int,
) -> Shard:
    """Write the files of one shard and, last, its description; each appears under its name when it is complete."""
    files = {split: _write_tokens(folder, f"{split}-{number:05d}.bin", pieces) for split, pieces in streams.items()}
    shard = Shard(number, files, dict(documents), characters)
    write_sealed(folder / f"shard-{number:05d}.json", asdict(shard), indent=1)
    return shard


def finished_shards(folder: Path, dtype: np.dtype) -> dict[int, Shard]:
    """Return the shards that are complete and have the content that was written, by number."""
    finished = {}
    for path in sorted(folder.glob("shard-*.json")):
        try:
            values = read_sealed(path)
            files = {split: TokenFile(**file) for split, file in values["files"].items()}
            for file in files.values():
                file.check(folder, dtype, contents=True)
        except (BrokenShard, ValueError, KeyError, TypeError):
            continue
        finished[values["number"]] = Shard(**{**values, "files": files})
    return finished


def remove_other_shards(folder: Path, shards: int) -> None:
    """Remove the files of shards from number `shards` on, and what an interrupted writer left behind."""
    kept = {f"{number:05d}" for number in range(shards)}
    for path in folder.iterdir():
        kind, _, number = path.stem.partition("-")
        if path.name.startswith(WRITING) or (kind in (*SPLITS, "shard") and number not in kept):
            path.unlink()


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy in nats of the token distribution: the loss of the best model that ignores context."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def _write_tokens(folder: Path, name: str, pieces: Iterable[NDArray[np.unsignedinteger]]) -> TokenFile:
    digest, tokens = hashlib.sha256(), 0
    with whole_file(folder / name, "wb") as file:
        for piece in pieces:
            file.write(piece.data)
            digest.update(piece.data)
            tokens += len(piece)
    return TokenFile(name, tokens, digest.hexdigest())


def _broken(path: Path, what: str) -> BrokenShard:
    return BrokenShard(
        f"the token file {path} {what}; run `prepare` again with the same arguments: it keeps the whole files and "
        "writes the broken ones anew"
    )
