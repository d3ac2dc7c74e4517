"""Errors that name what was typed, what is allowed and what to do, and the status that a process ends with for each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

BAD_INPUT = 2
"""Exit status: nothing was begun, and one message says why."""

FAILED = 3
"""Exit status: what had begun could not go on."""

INTERRUPTED = 130
"""Exit status: Ctrl-C or SIGTERM, as a shell has it."""


class RecipeError(ValueError):
    """Bad input found before training started. The message is for the person who typed it; no traceback is shown."""


class TrainingFailure(RuntimeError):
    """A run that had begun cannot go on, and all ranks know. What was saved is whole and is named to the user."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> RecipeError:
    """Make the error for a name that is not in `known`, with the nearest names first and then all of them.

    Args:
        what: what the name stands for, e.g. "preset".
        name: as it was typed.
        known: the names that exist.
    """
    names = sorted(known)
    # Case is ignored in the comparison, so that LAMB finds lamb.
    nearest = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(nearest)}; " if nearest else ""
    return RecipeError(f"unknown {what} {name!r}; {hint}known: {', '.join(names)}")
