"""Files and folders that are written whole or not at all, and what becomes of those that a killed process had begun."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from .errors import RecipeError, kind_of, sentence

WRITING = ".writing-"
"""What the name of a file or folder begins with until it is whole, and that of a folder again while it is removed; a
process that was killed may leave such behind."""

_TOKEN = 8  # random bytes in a name
_TEMPORARY = re.compile(rf"{re.escape(WRITING)}[0-9a-f]{{{2 * _TOKEN}}}")

DIGEST = "digest"
"""Last entry of a sealed file: SHA-256 of its bytes, in which 64 zeros stand for it."""

_BLANK = "0" * 64
_LIKE_A_SEAL = re.compile(rb'"[0-9a-f]{64}"\s*}\s*$')  # what is left of one whose name was damaged


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when the block ends, and is on the disk then.

    Until then, and if anything goes wrong, `path` is what it was before. Several processes may write the same file at
    once: the last one's stays. What killed processes had begun to write into the folder is removed.

    Args:
        path: in a folder that exists.
        mode: "w" for UTF-8 text, "wb" for bytes.

    Raises:
        OSError: the file cannot be written.
    """
    remove_abandoned(path.parent)
    temporary, file = _begin(path.parent, mode)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # while it is locked
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _begin(folder: Path, mode: str) -> tuple[Path, IO[Any]]:
    """Open a new file, locked as long as it is open where the disk has locks."""
    while True:
        path = folder / f"{WRITING}{secrets.token_hex(_TOKEN)}"  # not longer for a long name
        file = path.open(mode, encoding=None if "b" in mode else "utf-8")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return path, file
        file.close()  # taken for abandoned before it was locked


def remove_abandoned(folder: Path) -> None:
    """Remove the files of `whole_file` in a folder that killed processes had begun to write: those that are not locked.

    Nothing is removed where the disk has no locks.
    """
    for path in folder.glob(f"{WRITING}*"):
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError), path.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def finish_folder(unfinished: Path, final: Path) -> None:
    """Give a folder that is complete its name; one that has the name is removed."""
    remove_folder(final)
    os.rename(unfinished, final)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there, so that no part of it is ever taken for the whole."""
    unfinished = folder.with_name(f"{WRITING}{secrets.token_hex(_TOKEN)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, unfinished)
        _remove(unfinished)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes had begun to write or to remove, folders too; nobody else may write there now."""
    remove_abandoned(folder)
    for path in folder.glob(f"{WRITING}*"):
        if path.is_dir() or path.is_symlink():
            _remove(path)


def _remove(folder: Path) -> None:
    """Remove a folder; of a link to one the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def require_writable(folder: Path) -> None:
    """Check that `folder` is one that can be written, or could be created; nothing is created.

    Raises:
        RecipeError: it is not; says why and what to do.
    """
    path = folder.absolute()
    try:
        with contextlib.suppress(FileNotFoundError):
            path.stat()
        nearest = next(part for part in (path, *path.parents) if os.path.lexists(part))
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
        if os.statvfs(nearest).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(nearest))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(nearest))
    except OSError as error:
        raise RecipeError(f"cannot use output folder {str(folder)!r}: {sentence(error)}") from error


def require_place_for(file: Path) -> None:
    """Check, before the work whose result goes there, that a file can be written; its folder need not exist.

    Raises:
        RecipeError: it cannot; says why and what to do.
    """
    if file.is_dir():
        raise RecipeError(f"output file {str(file)!r} is a folder: choose a file")
    require_writable(file.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that the file is always either the old or the new one."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, values: Any, indent: int = 2) -> None:
    """Write JSON so that the file is always either the old or the new one."""
    write_text(path, json.dumps(values, indent=indent) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error


def read_json(path: Path, *entries: str) -> dict[str, Any]:
    """Return the JSON object in a file that a command wrote and goes on with.

    Raises:
        RecipeError: it cannot be read, is no object, or lacks one of the `entries`.
    """
    try:
        values = read_sealed(path)
        missing = [name for name in entries if name not in values]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
    except (OSError, ValueError) as error:
        reason = sentence(error) if isinstance(error, OSError) else error
        raise RecipeError(f"cannot read {path}: {reason}; copy it anew, or remove it to begin again") from error
    return values


def write_sealed(path: Path, values: Mapping[str, Any], indent: int = 2) -> None:
    """Write JSON with a digest of all of it, by which `read_sealed` tells a damaged file."""
    text = json.dumps({**values, DIGEST: _BLANK}, indent=indent) + "\n"
    head, _, tail = text.rpartition(_BLANK)
    write_text(path, head + hashlib.sha256(text.encode()).hexdigest() + tail)


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what `write_sealed` wrote; a file that was never sealed, of earlier releases, is taken as it is.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object, or not what was written.
    """
    content = path.read_bytes()
    values = parse_json(content)
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {kind_of(values)}")
    digest = values.pop(DIGEST, None)
    if digest is None and not _LIKE_A_SEAL.search(content):
        return values
    head, found, tail = content.rpartition(str(digest).encode())
    if not found or hashlib.sha256(head + _BLANK.encode() + tail).hexdigest() != digest:
        raise ValueError(
            f"its content is not what was written, as the digest at its end tells: copy the file anew (or, if you "
            f'changed it yourself, remove its last entry, "{DIGEST}")'
        )
    return values
