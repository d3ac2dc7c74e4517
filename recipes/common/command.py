"""How a command reads its arguments and how it ends when they are bad."""

from __future__ import annotations

import argparse
import functools
import math
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, ParamSpec

from .errors import BAD_INPUT, FAILED, RecipeError, nearest_names, sentence

P = ParamSpec("P")

MOST = 2**31 - 1
"""The largest number that any option takes for a size, a count or a number of steps."""

MOST_SEED = 2**32 - 1
"""The largest seed that torch, NumPy and the Trainer all take."""


class CommandParser(argparse.ArgumentParser):
    """Raises RecipeError for bad arguments, where argparse would print its usage and exit, on every rank.

    An option may be written with `-` for `_`; a misspelt one is answered with the nearest. An empty text, which is what
    a shell makes of a variable that is not set, is no value.
    """

    def __init__(self, examples: Sequence[str] = (), **options: Any) -> None:
        """Make a parser that takes whole names only.

        Args:
            examples: whole command lines, which --help shows last.
            options: of argparse's parser.
        """
        if examples:
            shown = "\n".join(["examples:", *(f"  {example}" for example in examples)])
            options["epilog"] = "\n\n".join(filter(None, (options.get("epilog"), shown)))
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Help, **options})
        self.register("type", int, _whole_number)
        self.register("type", float, _number)

    def flags(self) -> list[str]:
        """Return the long names of all options."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Read what is known, and return the rest with `_` in the names of options."""
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args([with_underscores(text) for text in arguments], namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Read all arguments.

        Raises:
            RecipeError: there are others.
        """
        options, rest = self.parse_known_args(args, namespace)
        self.refuse(rest)
        return options

    def refuse(self, rest: Sequence[str], elsewhere: Mapping[str, str] = MappingProxyType({})) -> None:
        """Refuse what was not understood.

        Args:
            rest: what was not; its first entry is named.
            elsewhere: names that other programs have for things, with what these are called here.

        Raises:
            RecipeError: there is something; the three nearest names are given.
        """
        for text in rest:
            if not text.startswith("-"):
                raise RecipeError(f"{text!r} belongs to no option; --help lists them")
            name = text.partition("=")[0]
            called = {**{flag: flag for flag in self.flags()}, **elsewhere}
            nearest = dict.fromkeys(called[known] for known in nearest_names(name, called))
            raise RecipeError(f"unknown option {name!r}; nearest: {', '.join(nearest)}; --help lists all")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if not arg_string and action.default != arg_string:
            name = "/".join(action.option_strings) or action.dest
            raise RecipeError(f"{name} is empty (is a variable not set?): give it a value, or leave it out")
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise RecipeError(f"{message}; --help lists the options")


class _Help(argparse.HelpFormatter):
    """Says every option's default, and keeps the lines of description and epilog, the long ones folded."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, False, argparse.SUPPRESS) or default == [] or "default" in text:
            return text
        values = default if isinstance(default, list | tuple) else [default]
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        return f"{text} (default: {shown.replace('%', '%%')})".lstrip()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # Commands stay on one line, to be copied.
        lines = (line if line.startswith("  ") else textwrap.fill(line, width) for line in text.splitlines())
        return "\n".join(indent + line for line in lines)


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a whole number in digits, such as 1000, given was {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number, such as 0.01 or 1e-2, given was {text!r}") from None


def with_underscores(text: str) -> str:
    """Return an argument with `_` for `-` in the name of a long option: `--global-batch=8` is `--global_batch=8`."""
    name, equals, value = text.partition("=")
    if not name.startswith("--"):
        return text
    return "--" + name[2:].replace("-", "_") + equals + value


def within(option: str, value: float | None, least: float, most: float = MOST, *, above: bool = False) -> None:
    """Check a number that was given for an option; None was not given.

    Args:
        option: its name, e.g. "--epochs".
        value: the number.
        least: the smallest that is allowed.
        most: the largest.
        above: `least` itself is not allowed.

    Raises:
        RecipeError: it is outside, infinite or not a number.
    """
    if value is None:
        return
    fits = math.isfinite(value) and value <= most and (value > least if above else value >= least)
    if not fits:
        finite = "" if math.isfinite(value) else "a finite number, "
        raise RecipeError(
            f"{option} {value} is out of range: allowed is {finite}{'above' if above else 'from'} {least:g} to {most:,}"
        )


def ends_with_message(prefix: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Make a command's `main`, which returns its exit status, end with "PREFIX: message" instead of a traceback.

    The status is 2 for bad input, and 3 if a file could not be read or written on the way.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*arguments: P.args, **options: P.kwargs) -> int:
            try:
                return main(*arguments, **options)
            except RecipeError as error:
                print(f"{prefix}: {error}", file=sys.stderr, flush=True)
                return BAD_INPUT
            except OSError as error:
                print(f"{prefix}: {sentence(error)}", file=sys.stderr, flush=True)
                return FAILED

        return run

    return decorate
