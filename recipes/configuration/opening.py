"""What a pretraining command does before its imports, which take seconds: refuse a bad line, and say that it begins."""

from __future__ import annotations

import contextlib
import io
import os

from ..common.errors import BAD_INPUT, FAILED, RecipeError, sentence
from ..common.reporter import Reporter
from .command_line import parse_command_line
from .presets import list_presets


def main() -> int | None:
    """Answer --help, --list_presets and bad options at once, on the first rank; else print that the command begins.

    Returns:
        The exit status of what is answered; None: the command goes on.
    """
    reporter = Reporter(active=os.environ.get("RANK", "0") == "0")
    try:
        return _open(reporter)
    except RecipeError as error:
        reporter.error(f"error: {error}")
        return BAD_INPUT
    except OSError as error:  # a full disk that takes no line
        reporter.error(f"error: {sentence(error)}")
        return FAILED


def _open(reporter: Reporter) -> int | None:
    with contextlib.nullcontext() if reporter.active else contextlib.redirect_stdout(io.StringIO()):
        invocation = parse_command_line(say=reporter.line)
    if invocation.list_presets:
        for line in list_presets():
            reporter.line(line)
        return 0
    ranks = os.environ.get("WORLD_SIZE", "1")
    reporter.line(f"{invocation.config.preset} on {ranks} {'rank' if ranks == '1' else 'ranks'}: importing torch ...")
    return None
