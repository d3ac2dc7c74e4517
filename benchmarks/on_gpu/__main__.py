"""Everything there is to find out on a GPU, in the order of its worth, in nine minutes.

python -m benchmarks.on_gpu                           # all parts; numbers into docs/results/gpu/
python -m benchmarks.on_gpu --wheels .whl             # what the machine lacks is installed first, without a network
python -m benchmarks.on_gpu --parts kernels --minutes 4
python -m benchmarks.on_gpu --rehearse                # on the CPU, at toy size: the same parts, files and lines
python -m benchmarks.on_gpu --page results.tar.gz     # takes numbers from there and writes them into the documentation

Only Python's own library is needed here: whatever is missing or broken, the rest is run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from .part import PARTS
from .runner.environment import ROOT, prepare
from .runner.parts import Runner
from .runner.results import Results

RESULTS = ROOT / "docs" / "results" / "gpu"
INSTALLING = 0.25
"""The largest share of the time that wheels may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if every part that there was time for has passed."""
    began = time.monotonic()
    options = _parser().parse_args(arguments)
    if options.page is not None:
        from .page import write_pages

        return write_pages(options.page)
    scratch = Path(tempfile.mkdtemp(prefix="on_gpu-"))
    try:
        return _run(options, began, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=9.0, help="for everything, installing included (default: 9)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="NAME", help=f"some of {', '.join(PARTS)}")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for NAME.json, NAME.log and summary.txt; default: docs/results/gpu. Where the variable OUT names "
        "a folder and this is not given, summary.txt and results.tar.gz there",
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="folder of wheels to install, and this package, first"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU at toy size; without --output it leaves nothing"
    )
    parser.add_argument(
        "--page",
        nargs="?",
        const=RESULTS,
        type=Path,
        metavar="FROM",
        help="run nothing: write tables into docs/ of the numbers in docs/results/gpu, after taking those of a folder "
        "or results.tar.gz",
    )
    return parser


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < 24 * 60:
        raise argparse.ArgumentTypeError(f"must be more than 0 and less than a day, got {text}")
    return minutes


def _run(options: argparse.Namespace, began: float, scratch: Path) -> int:
    results = _results(options, scratch)
    before = signal.signal(signal.SIGTERM, _interrupt)
    now = datetime.now(timezone.utc).isoformat(timespec="minutes")
    device = "CPU, a rehearsal" if options.rehearse else _device()
    results.say(f"{device}; {now}; at most {options.minutes:g} minutes")
    names = [name for name in PARTS if options.parts is None or name in options.parts]
    try:
        log = results.folder / "install.log"
        seconds = options.minutes * 60 * INSTALLING
        environment = prepare(
            scratch, log, results.say, seconds=seconds, wheels=options.wheels, rehearse=options.rehearse
        )
        runner = Runner(
            results,
            lambda name, limit: _command(name, limit, results.folder, options.rehearse),
            environment,
            ROOT,
            began + 60 * options.minutes,
            facts={"device": device, "when": now, "rehearsal": options.rehearse},
        )
        passed = runner.run(names)
    except KeyboardInterrupt:
        results.say("interrupted")
        passed = False
    finally:
        signal.signal(signal.SIGTERM, before)
    results.say(f"{time.monotonic() - began:.0f} s in all")
    results.pack(now=True)
    print(_where(results, scratch))
    return 0 if passed else 1


def _results(options: argparse.Namespace, scratch: Path) -> Results:
    out = os.environ.get("OUT")
    if options.output is not None:
        return Results(options.output.resolve())
    if out:
        return Results(scratch / "results", Path(out).resolve())
    return Results(scratch / "results" if options.rehearse else RESULTS)


def _where(results: Results, scratch: Path) -> str:
    """Last of all, for who sits before it."""
    folder = results.bring or results.folder
    return f"results in {folder}" if scratch not in folder.parents else "nothing was kept: give --output DIR"


def _command(name: str, limit: float, output: Path, rehearse: bool) -> list[str]:
    # The interpreter starts before the part's clock does.
    command = [
        sys.executable,
        "-m",
        "benchmarks.on_gpu.part",
        name,
        "--output",
        str(output),
        "--limit",
        f"{limit - 1:.1f}",
    ]
    return [*command, "--rehearse"] if rehearse else command


def _device() -> str:
    """Name and driver of the first GPU, as its driver says."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return "; ".join(line.strip() for line in found.splitlines() if line.strip()) or "no GPU"
    return "unknown GPU (nvidia-smi does not answer)"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
