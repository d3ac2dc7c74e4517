"""The hash of a file's bytes after its header: of pieces, so that the ranks of a machine share the reading of it."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
    """Whether this machine's file has the content with this hash. All ranks of the machine must call it."""
    name = socket.gethostname()
    here = [number for number, host in enumerate(of_all_ranks(name)) if host == name]
    file = Path(path)
    begin, end = 8 + _header_length(file), file.stat().st_size
    starts = range(begin, end, PIECE)
    threads = min(MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // len(here)))
    with ThreadPoolExecutor(threads) as pool:
        mine = list(pool.map(lambda start: _hash(file, start), starts[here.index(rank()) :: len(here)]))
    of_ranks = of_all_ranks(mine)
    pieces = [""] * len(starts)
    for number, one in enumerate(here):
        pieces[number :: len(here)] = of_ranks[one]
    return _of_pieces(pieces) == expected


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
