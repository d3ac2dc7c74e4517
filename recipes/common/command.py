"""How a command reads its arguments and how it ends when they are bad."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from .errors import BAD_INPUT, RecipeError

P = ParamSpec("P")


class CommandParser(argparse.ArgumentParser):
    """Raises RecipeError for bad arguments, where argparse would print its usage and exit, on every rank."""

    def flags(self) -> list[str]:
        """Return the long names of all options."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise RecipeError(f"{message}; --help lists the options")


def ends_with_message(prefix: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Make a command's `main`, which returns its exit status, end with "PREFIX: message" and status 2 for bad input."""

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*arguments: P.args, **options: P.kwargs) -> int:
            try:
                return main(*arguments, **options)
            except RecipeError as error:
                print(f"{prefix}: {error}", file=sys.stderr, flush=True)
                return BAD_INPUT

        return run

    return decorate
