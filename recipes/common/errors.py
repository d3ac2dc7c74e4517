"""Errors that name what was typed, what is allowed and what to do, and the status that a process ends with for each."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import Any

BAD_INPUT = 2
"""Exit status: nothing was begun, and one message says why."""

FAILED = 3
"""Exit status: what had begun could not go on."""

INTERRUPTED = 130
"""Exit status: Ctrl-C or SIGTERM, as a shell has it."""

STOPPED = 138
"""Exit status: asked by SIGUSR1 to stop, with a checkpoint or before training: the same command goes on.

It is what a shell, srun and a kubelet make of a process that SIGUSR1 ends, and above 127, which Kubeflow starts again.
"""


class RecipeError(ValueError):
    """Bad input found before training started. The message is for the person who typed it; no traceback is shown."""


class TrainingFailure(RuntimeError):
    """A run that had begun cannot go on, and all ranks know. What was saved is whole and is named to the user."""


class NothingToDo(RecipeError):
    """What was asked for has been done before. A command ends with status 0 and the message."""


def nearest_names(name: str, known: Iterable[str], least: float = 0.0) -> list[str]:
    """Return the three of `known` that are most like `name`; fewer if others are below `least`, from 0 to 1."""
    # Case is ignored in the comparison, so that LAMB finds lamb.
    spelled = {text.lower(): text for text in known}
    return [spelled[text] for text in difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=least)]


def unknown_name(what: str, name: str, known: Iterable[str]) -> RecipeError:
    """Make the error for a name that is not in `known`, with the nearest names first and then all of them.

    Args:
        what: what the name stands for, e.g. "preset".
        name: as it was typed.
        known: the names that exist.
    """
    names = sorted(known)
    nearest = nearest_names(name, names, least=0.5)
    hint = f"nearest: {', '.join(nearest)}; " if nearest else ""
    return RecipeError(f"unknown {what} {shown(name)}; {hint}known: {', '.join(names)}")


def kind_of(value: Any) -> str:
    """Return what a value read from JSON is, in words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    words = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return words.get(type(value), type(value).__name__)


def shown(value: Any, most: int = 80) -> str:
    """Return a value as it is written in Python, cut to `most` characters for a message."""
    return cut(repr(value), most)


def cut(text: str, most: int) -> str:
    """Return a text, or its first `most` characters for a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def sentence(error: OSError) -> str:
    """Return what a file or disk refused, and what to do, as one sentence without a traceback."""
    what = {
        errno.ENOSPC: "free some space, or choose a folder on another disk",
        errno.EDQUOT: "the quota is used up: free some space, or choose a folder elsewhere",
        errno.EROFS: "choose a folder that can be written",
        errno.EACCES: "choose a folder that this user may write",
        errno.EPERM: "choose a folder that this user may write",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.ENOTDIR: "a part of the path is a file: choose another folder",
        errno.EISDIR: "it is a folder: choose a file",
    }.get(error.errno or 0)
    reason = error.strerror or str(error) or type(error).__name__
    shown = reason if error.filename is None else f"{str(error.filename)!r}: {reason}"
    return f"{shown}; {what}" if what else shown
