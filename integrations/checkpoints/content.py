"""The hash of a file's bytes after its header: of pieces, so that the ranks of a machine share the reading of it."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

from .ranks import of_all_ranks, rank

__all__ = ["CONTENT", "UNKNOWN", "ContentHash", "has_content"]

CONTENT = "content"
"""Under which name the header has the hash."""

UNKNOWN = "0" * 64
"""What the header has until all is written."""

PIECE = 64 << 20
READ_AT_ONCE = 4 << 20
MOST_THREADS = 8


class ContentHash:
    """Hashes bytes as they are written."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._piece = hashlib.sha256()
        self._room = PIECE

    def update(self, content: memoryview) -> None:
        """Take the next bytes."""
        while content:
            part, content = content[: self._room], content[self._room :]
            self._piece.update(part)
            self._room -= len(part)
            if not self._room:
                self._pieces.append(self._piece.hexdigest())
                self._piece, self._room = hashlib.sha256(), PIECE

    def hexdigest(self) -> str:
        """The hash of all bytes so far."""
        return _of_pieces([*self._pieces, *([self._piece.hexdigest()] if self._room < PIECE else [])])


def has_content(path: str | os.PathLike[str], expected: str) -> bool:
    """Whether this machine's file has the content with this hash. All ranks must call it.

    Raises:
        OSError: a rank of this machine cannot read the file; raised by all of the machine.
    """
    name = socket.gethostname()
    here = [number for number, host in enumerate(of_all_ranks(name)) if host == name]
    try:
        mine: list[str] | OSError = _hashes(Path(path), here.index(rank()), len(here))
    except OSError as error:  # told to those that wait for the hashes
        mine = error
    of_ranks = of_all_ranks(mine)
    parts = [of_ranks[number] for number in here]
    for part in parts:
        if isinstance(part, OSError):
            raise part
    return _of_pieces([piece for row in zip_longest(*parts) for piece in row if piece]) == expected


def _hashes(file: Path, number: int, of: int) -> list[str]:
    """The hashes of every `of`-th piece, from the one with this number on."""
    starts = range(8 + _header_length(file), file.stat().st_size, PIECE)[number::of]
    with ThreadPoolExecutor(min(MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // of))) as pool:
        return list(pool.map(lambda start: _hash(file, start), starts))


def _header_length(file: Path) -> int:
    with file.open("rb") as opened:
        return int.from_bytes(opened.read(8), "little")


def _hash(file: Path, start: int) -> str:
    digest, left = hashlib.sha256(), PIECE
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while left and (block := opened.read(min(left, READ_AT_ONCE))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _of_pieces(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
