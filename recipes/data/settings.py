"""What a prepared folder was made with, by which a later run tells that it goes on with the same."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError
from ..common.files import read_sealed, write_sealed
from ..common.reporter import Reporter
from ..configuration.config import DataConfig
from ..sources.compressed import suffix_of
from ..sources.hub import HubName
from .documents import HUB_PREFIX, READ_SINCE_FORMAT_3
from .given_masks import AS_GIVEN
from .prepared import FORMAT, SETTINGS


def settings_of(config: DataConfig, sources: Sequence[str], column: str, tokenizer: str | None) -> dict[str, Any]:
    """Return all of a configuration that decides what a prepared folder holds.

    What was added after format 3 is there only if it is set, so that older folders have the settings that they had.

    Args:
        config: of the data.
        sources: expanded.
        column: of the text.
        tokenizer: fingerprint of the one that was given; None: one is trained.
    """
    settings: dict[str, Any] = {
        "format": FORMAT,
        "sources": [_identity(source) for source in sources],
        "text_column": column,
        "tokenizer": tokenizer or f"WordPiece {config.vocabulary}",
        "validation_fraction": config.validation_fraction,
    }
    limits = {name: getattr(config, name) for name in ("max_documents", "max_characters")}
    settings |= {name: value for name, value in limits.items() if value is not None}
    return settings | ({"masks": AS_GIVEN} if config.masks == AS_GIVEN else {})


def _identity(source: str) -> list[Any]:
    """Return what tells a source from a changed one without reading it."""
    if source.startswith(HUB_PREFIX):
        name = HubName.parse(source.removeprefix(HUB_PREFIX))
        return [source, os.path.abspath(name.path), name.revision()] if name.is_local else [source]
    status, suffix = os.stat(source), suffix_of(Path(source))
    identity = [os.path.abspath(source), status.st_size, status.st_mtime_ns]
    return identity + ([suffix] if suffix in READ_SINCE_FORMAT_3 else [])


def claim(folder: Path, settings: dict[str, Any], of_cache: bool) -> None:
    """Write the settings into a new folder, or compare them with those that are there.

    Args:
        folder: exists.
        settings: what is to be prepared.
        of_cache: its name says the settings, so that they can be written anew if they are damaged.

    Raises:
        RecipeError: the folder holds other data.
    """
    path = folder / SETTINGS
    others = [p.name for p in folder.iterdir() if not p.name.startswith(".") and p != path]
    if not path.exists() or not others:  # settings alone: a run that stopped at bad data, which may have been mended
        if others:
            raise RecipeError(f"{folder} holds {others[0]!r} and no prepared data; give an empty or a new folder")
        write_sealed(path, settings, indent=1)
        return
    try:
        stored = read_sealed(path)
    except ValueError as error:
        if not of_cache:  # whose folders are named by their settings
            raise RecipeError(f"cannot read {path}: {error}; or remove {folder} to start again") from error
        write_sealed(path, settings, indent=1)
        return
    changed = [name for name in {**settings, **stored} if stored.get(name) != settings.get(name)]
    if changed:
        raise RecipeError(
            f"{folder} holds data prepared with other settings ({', '.join(changed)} differ); give another folder, "
            "or remove it to start again"
        )


@contextlib.contextmanager
def only_one(folder: Path, reporter: Reporter) -> Iterator[None]:
    """Let one process at a time write a folder; the others wait and then find the work done."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.line(f"waiting for another process that prepares {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: two writers write the same files, each as a whole
        yield


def hash_of_parts(*parts: object) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
