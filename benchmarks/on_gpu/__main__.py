"""Everything there is to find out on a GPU, in the order of its worth, in nine minutes.

python -m benchmarks.on_gpu                           # all parts; numbers into docs/results/gpu/
python -m benchmarks.on_gpu --wheels .whl             # what the machine lacks is installed first, without a network
python -m benchmarks.on_gpu --parts kernels --minutes 4
python -m benchmarks.on_gpu --rehearse                # on the CPU, at toy size: the same parts, files and lines
python -m benchmarks.on_gpu --page results.tar.gz     # takes numbers from there and writes them into the documentation

Exit status: 0 if every part that there was time for has passed, 1 if one has not, 2 if nothing can be run or taken here
(no device, no such folder), 3 if there was no time for any part.

torch and a device have to be there; whatever else is missing or broken, the rest is run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from .part import PARTS
from .runner.environment import ROOT, Unusable, missing_device, prepare
from .runner.parts import Runner
from .runner.processes import ask
from .runner.results import Results

RESULTS = ROOT / "docs" / "results" / "gpu"
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
INSTALLING = 0.25
"""The largest share of the time that wheels may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if every part that there was time for has passed; the other exit statuses are in `--help`."""
    began = time.monotonic()
    options = _parser().parse_args(arguments)
    try:
        if options.page is not None:
            from .page import write_pages

            return write_pages(options.page)
        with _interruptible(), _scratch() as scratch:
            return _run(options, began, scratch)
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    try:
        scratch = Path(tempfile.mkdtemp(prefix="on_gpu-"))
    except OSError as error:
        raise Unusable(f"There is no folder for temporary files: {error}. Set TMPDIR.") from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Have the first signal to end raise KeyboardInterrupt, and later ones disturb nothing of what is written then."""
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup leaves one

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in heeded:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    if options.wheels is not None and not options.wheels.is_dir():
        raise Unusable(f"--wheels {options.wheels}: there is no such folder.")
    if not options.rehearse:
        _expect_device(options.wheels, scratch)
    results = _results(options, scratch)
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
        status = 0 if runner.run(names) else 1
        if not runner.begun:
            results.say(f"nothing was run: {options.minutes:g} minutes have no time for any of {', '.join(names)}")
            status = 3
    except KeyboardInterrupt:
        results.say("interrupted")
        status = 1
    except Unusable as error:
        results.say(str(error))
        status = 2
    results.say(f"{time.monotonic() - began:.0f} s in all")
    results.pack(now=True)
    with contextlib.suppress(OSError):
        print(_where(results, scratch), flush=True)
    return status


def _expect_device(wheels: Path | None, scratch: Path) -> None:
    """Stop before anything is written where there is nothing to measure."""
    if wheels is not None and any(wheels.glob("torch-*.whl")):
        return  # which is not installed yet
    if missing := missing_device(scratch):
        raise Unusable(f"{missing}; --rehearse runs on the CPU.")


def _results(options: argparse.Namespace, scratch: Path) -> Results:
    out = os.environ.get("OUT")
    if options.output is not None:
        return _writable(options.output.resolve())
    if out:
        return _writable(scratch / "results", Path(out).resolve())
    return _writable(scratch / "results" if options.rehearse else RESULTS)


def _writable(folder: Path, bring: Path | None = None) -> Results:
    """Results in these folders, once it is known that they take files."""
    try:
        results = Results(folder, bring)
        for made in filter(None, (folder, bring)):
            with tempfile.TemporaryFile(dir=made):
                pass
    except OSError as error:
        raise Unusable(f"Results cannot be written: {error}. Give a folder with --output DIR.") from error
    return results


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
    status, lines = ask(query, 20.0, os.environ, ROOT)
    return "; ".join(lines) or "no GPU" if status == 0 else "unknown GPU (nvidia-smi does not answer)"


if __name__ == "__main__":
    sys.exit(main())
