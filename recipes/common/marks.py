"""Marks of files: their length and a hash of every byte, by which a file that was damaged or replaced is told.

Hashing takes a second per GB and core, so the threads of a process share it, and the ranks of a run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .errors import RecipeError, sentence
from .files import read_json, write_sealed
from .progress import PROGRESS

PIECE = 1 << 26
"""Bytes of a file that are hashed one after the other; a large file's pieces go to several ranks."""

CHECKSUMS = "checksums.json"
"""In the folder of a finished model: the marks of its files."""

CARD = "README.md"
"""Beside it: the model card, which is there to be written on and so has no mark."""

_AT_ONCE = 1 << 22  # bytes in memory, per thread
_MOST_THREADS = 8
_END = 1 << 20  # what the marks of earlier releases cover: a file's end alone
_WHOLE = "whole"
_UNREADABLE = "cannot be read"

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The part of one process in work that several do together.

    Attributes:
        number, of: which of how many it is.
        collect: returns the value that each of them gives, by number (collective).
        threads: at work in this process.
    """

    number: int = 0
    of: int = 1
    collect: Callable[[Any], list[Any]] = lambda value: [value]
    threads: int = field(default_factory=lambda: cores_each(1))

    def of_first(self, work: Callable[[], T]) -> T:
        """Return in all of them what `work` returns in the first (collective).

        Raises:
            OSError, RecipeError: `work` raised one; raised in all.
        """
        outcome: Any = None
        if self.number == 0:
            try:
                outcome = work()
            except OSError as error:
                outcome = OSError(sentence(error))
            except RecipeError as error:
                outcome = RecipeError(str(error))
        outcome = self.collect(outcome)[0]
        if isinstance(outcome, OSError | RecipeError):
            raise outcome
        return outcome


def cores_each(processes: int) -> int:
    """Return the number of threads that each of so many processes on this machine may use for hashing."""
    return min(_MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // processes))


def hashed(items: Sequence[T], work: Callable[[T], str], share: Share) -> list[str]:
    """Apply `work` to all items, each process to its share, and return all results (collective over the share).

    Args:
        items: the same in all processes.
        work: what fails in it with an OSError has a result that is no hash.
        share: who works.
    """

    def attempt(item: T) -> str:
        try:
            return work(item)
        except OSError as error:
            return f"{_UNREADABLE} ({sentence(error)})"

    mine = items[share.number :: share.of]
    with ThreadPoolExecutor(share.threads) as threads:
        parts = share.collect(list(threads.map(attempt, mine)))
    results = [""] * len(items)
    for number, part in enumerate(parts):
        results[number :: share.of] = part
    return results


def hash_of(path: Path, start: int = 0, length: int | None = None) -> str:
    """Return the SHA-256 of a file, or of `length` bytes of it from `start` on."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while length is None or length > 0:
            read = file.readinto(block[: _AT_ONCE if length is None else min(_AT_ONCE, length)])
            if not read:
                break
            digest.update(block[:read])
            PROGRESS.move()
            length = None if length is None else length - read
    return digest.hexdigest()


def mark_files(folder: Path, names: Iterable[str], share: Share) -> dict[str, str]:
    """Return the marks of files (collective over the share).

    Args:
        folder: that they lie in; all processes see it.
        names: of the first process, the others' are not looked at; paths in the folder.
        share: who works.

    Raises:
        OSError: one of them cannot be read, by any process; raised in all.
    """
    sizes = share.of_first(lambda: {name: (folder / name).stat().st_size for name in names})
    pieces = [(name, start) for name, size in sizes.items() for start in range(0, max(size, 1), PIECE)]
    hashes: dict[str, list[str]] = {}
    results = hashed(pieces, lambda piece: hash_of(folder / piece[0], piece[1], PIECE), share)
    for (name, _), result in zip(pieces, results, strict=True):
        if result.startswith(_UNREADABLE):
            raise OSError(f"{folder / name} {result}")
        hashes.setdefault(name, []).append(result)
    return {name: f"{size} {_WHOLE} {_joined(hashes[name])}" for name, size in sizes.items()}


def differing_files(folder: Path, marks: Mapping[str, str], share: Share) -> list[str]:
    """Return the names of the files that are not as their marks say (collective over the share).

    Args:
        folder: that they lie in.
        marks: by name, the same in all processes. Those of earlier releases cover a file's length and end.
        share: who works.

    Raises:
        OSError: one of them cannot be read, by any process; raised in all.
    """
    differing = share.of_first(lambda: [name for name, mark in marks.items() if not _may_be(folder / name, mark)])
    whole = [name for name, mark in marks.items() if _is_whole(mark) and name not in differing]
    found = mark_files(folder, whole, share)
    return [*differing, *(name for name in whole if found[name] != marks[name])]


def _may_be(file: Path, mark: str) -> bool:
    """Tell whether a file is as its mark says, as far as its length and, of earlier releases' marks, its end tell."""
    size = file.stat().st_size
    if mark.split()[:1] != [str(size)]:
        return False
    return _is_whole(mark) or mark == f"{size} {hash_of(file, max(0, size - _END), _END)}"


def _joined(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _is_whole(mark: str) -> bool:
    return mark.split()[1:2] == [_WHOLE]


def write_checksums(folder: Path) -> None:
    """Write a list of the files in a folder, by which `require_unchanged` tells those that were damaged later."""
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.name not in (CHECKSUMS, CARD)]
    write_sealed(folder / CHECKSUMS, {"files": mark_files(folder, names, Share())})


def require_unchanged(folder: Path) -> None:
    """Check that a folder's files are those that were listed when it was written; one without a list passes.

    Raises:
        RecipeError: names the files that are not.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return
    marks = read_json(path, "files")["files"]
    try:
        missing = [name for name in marks if not (folder / name).is_file()]
        differing = differing_files(folder, {name: marks[name] for name in marks if name not in missing}, Share())
    except OSError as error:
        raise RecipeError(f"cannot read {folder}: {sentence(error)}") from error
    if missing or differing:
        raise RecipeError(
            f"{', '.join([*missing, *differing])} in {folder} was changed, cut short or removed after it was written: "
            f"write the folder anew, or remove {path} if the change was meant"
        )
