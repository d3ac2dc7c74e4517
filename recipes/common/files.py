"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import RecipeError, sentence

WRITING = ".writing-"
"""What the name of a file begins with until it is whole; a process that was killed may leave such files behind."""


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when the block ends, and is on the disk then.

    Until then, and if anything goes wrong, `path` is what it was before. Several processes may write the same file at
    once: the last one's stays.

    Args:
        path: in a folder that exists.
        mode: "w" for UTF-8 text, "wb" for bytes.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(WRITING + secrets.token_hex(8))  # not longer for a long name
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
