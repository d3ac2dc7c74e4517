"""The command `python -m trustratio.integrations.layer_norms`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .report import write_report

__all__ = ["main"]

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status, which is 2, after one message, where the file is none of layer norms."""
    options = _parser().parse_args(arguments)
    try:
        print(write_report(options.file, options.output))
    except OSError as error:
        return _fail(f"{str(error.filename)!r}: {error.strerror}" if error.filename is not None else str(error))
    except ValueError as error:
        return _fail(str(error))
    return 0


def _called() -> str:
    """How this was called: the console command puts itself and its word into the first argument."""
    console = sys.argv[0].startswith("trustratio ")
    return sys.argv[0] if console else "python -m trustratio.integrations.layer_norms"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_called(),
        description="Look at layer norms that LayerNorms.write_to(file=...) has written.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="report")
    report = commands.add_parser(
        "report",
        help="make one HTML page of a file",
        description="Make one HTML page, which needs nothing else, of a file that LayerNorms.write_to(file=...) has "
        "written; training may be going on. It has curves of the whole model, a map of layers and steps, the layers of "
        "the last step as a table, and names layers that never move or are not finite.",
        epilog=f"example: {_called()} report runs/layer_norms.jsonl",
        allow_abbrev=False,
    )
    report.add_argument("file", type=Path, metavar="FILE", help="the file, one measured step per line")
    report.add_argument(
        "--output", type=Path, metavar="FILE.html", help="the page (default: beside FILE, with the ending .html)"
    )
    return parser


def _fail(message: str) -> int:
    print(f"layer_norms: {message}", file=sys.stderr, flush=True)
    return BAD_INPUT
