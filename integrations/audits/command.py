"""The command line of the audit."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .configurations import Configuration
from .errors import CannotAudit
from .examination import STEPS, audited_device, check_ranks, check_steps, examine
from .optimizer_section import chosen_subject
from .page import page_of
from .printing import described
from .ranks import Ranks, check_timeout
from .reading import configuration_of
from .verdict import Report

__all__ = ["run_command"]

EPILOG = """
exit status: 0 exact, 1 wrong, 2 could not be run

Modules are found from the folder in which the command runs: mine:make is the function make in ./mine.py.

examples:
  python -m trustratio.integrations.audit --optimizer torch.optim.AdamW --options lr=0.01 --deepspeed ds_config.json
  python -m trustratio.integrations.audit --deepspeed ds_config.json     # whose "optimizer" section is audited
  python -m trustratio.integrations.audit --optimizer mypackage.optim:make --fsdp 2 --model mypackage:build --ranks 4
  python -m trustratio.integrations.audit --optimizer lamb --options lr=0.01 --accelerate zero2.yaml --html audit.html
"""


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Audit as the arguments say, print the report, and return the exit status."""
    given = _parser().parse_args(arguments)
    try:
        report = _audit(given)
        print(described(report))
        for path, text in ((given.json, _json), (given.html, page_of)):
            if path is not None:
                _write(path, text(report))
    except CannotAudit as error:
        print(f"Could not be run: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # 1 says that the optimizer is wrong, which nobody knows here
        traceback.print_exc()
        print(f"Could not be run: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return report.status


def _audit(given: argparse.Namespace) -> Report:
    options, configuration = _options(given.options), _configuration(given)
    check_ranks(given.ranks, configuration)
    check_timeout(given.timeout)
    check_steps(given.steps)
    for path in filter(None, (given.json, given.html)):
        if not path.absolute().parent.is_dir():
            raise CannotAudit(f"{path} cannot be written: there is no folder {path.absolute().parent}")
        if path.is_dir():
            raise CannotAudit(f"{path} cannot be written: it is a folder")
    subject, configuration = chosen_subject(given.optimizer, given.model, options, configuration)
    device = audited_device(given.ranks)
    with contextlib.closing(Ranks(given.ranks, device, given.timeout)) as ranks:
        return examine(subject, configuration, ranks, device, given.steps)


def _configuration(given: argparse.Namespace) -> Configuration:
    if given.fsdp is not None:
        return configuration_of({"fsdp": given.fsdp})
    if given.ddp:
        return configuration_of("ddp")
    path: Path = given.deepspeed or given.accelerate
    wanted = (".json",) if given.deepspeed else (".yaml", ".yml")
    if path.suffix not in wanted:
        raise CannotAudit(f"{path} does not end in {' or '.join(wanted)}")
    return configuration_of(path)


def _options(given: Sequence[str]) -> dict[str, Any]:
    options = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise CannotAudit(f"options are written name=value, as in lr=0.01 'betas=(0.9, 0.95)', not {item!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            if value.lower() in ("true", "false", "none", "null"):
                raise CannotAudit(
                    f"options are Python literals, as True, False and None are: {item!r} is a text"
                ) from None
            options[name] = value
    return options


def _json(report: Report) -> str:
    return json.dumps(report.record(), indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CannotAudit(f"{path} cannot be written: {error.strerror}") from error


def _called() -> str:
    """How this was called: the console command puts itself and its word into the first argument."""
    console = sys.argv[0].startswith("trustratio ")
    return sys.argv[0] if console else "python -m trustratio.integrations.audit"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_called(),
        description="Does your optimizer, sharded as you shard it, take the step that one process would?",
        epilog=EPILOG.replace("python -m trustratio.integrations.audit", _called()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--optimizer",
        help="package.module.Class, package.module:function of the parameters (or of the model, if its only "
        "required parameter is called model or module), or a name of this package, e.g. lamb (default: the "
        '"optimizer" section of the DeepSpeed configuration)',
    )
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="of the optimizer, as Python literals, e.g. lr=0.01 'betas=(0.9, 0.95)'",
    )
    parser.add_argument("--model", help="package.module:function without arguments (default: a small BERT-like model)")
    sharding = parser.add_mutually_exclusive_group(required=True)
    sharding.add_argument(
        "--deepspeed",
        type=Path,
        metavar="JSON",
        help='a DeepSpeed configuration, e.g. {"zero_optimization": {"stage": 1}}',
    )
    sharding.add_argument("--accelerate", type=Path, metavar="YAML", help="what `accelerate config` writes")
    sharding.add_argument("--fsdp", type=int, choices=(1, 2), help="FullyShardedDataParallel or fully_shard")
    sharding.add_argument("--ddp", action="store_true", help="DistributedDataParallel")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help=f"that are compared (default: {STEPS}; take more for an optimizer that does something only later)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="after which ranks that do not answer are ended (default: 600)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page too")
    return parser
