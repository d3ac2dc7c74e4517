"""Kills small runs of the BERT recipes at a hundred moments and compares the ends that they are continued to.

    python -m benchmarks.kills --count 100

A run is started with the one command line `--output DIR --resume auto`, killed by SIGKILL (a rank, the launcher, or
everything), started again, perhaps killed again, until it ends with status 0. Then checkpoint, exported model, metrics
and report have to be those of a run that nobody disturbed, bit for bit, and nothing may be left behind. The exit status
is 1 if an end differs. Three kills take about a minute of CPU time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.kills.chains import MOST_KILLS, Chain, End, Struck, drawn_kills, undisturbed
from benchmarks.kills.runs import CONFIGURATIONS, write_data
from benchmarks.machine import describe_machine
from benchmarks.tables import kills_table

_ROOT = Path(__file__).resolve().parents[2]
OUTPUT = _ROOT / "docs" / "results" / "kills.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if an end differs from the undisturbed one."""
    options = _options(arguments)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    results: dict[str, Any] = {"seed": options.seed, "machine": describe_machine("cpu"), "kills": [], "ends": []}
    for struck, end in carry_out(folder, options.configurations, options.count, options.seed):
        results["kills"] += map(asdict, struck)
        results["ends"].append(asdict(end))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1)
        for where in (folder, sys.prefix, _ROOT):  # of this machine, in the last lines of what was killed
            text = text.replace(f"{where}/", "")
        options.output.write_text(text + "\n")
    print(f"\n{kills_table(results)}\n\n{options.output}")
    differ = [end for end in results["ends"] if end["differences"]]
    if differ:
        print(f"what {len(differ)} runs left is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


def carry_out(folder: Path, configurations: Sequence[str], count: int, seed: int) -> Iterator[tuple[list[Struck], End]]:
    """Yield the kills and the end of one run after another, of each configuration in turn, until there are `count`."""
    write_data(folder / "data")
    chains: dict[str, Chain] = {}
    kills = Counter[str]()

    def told(struck: Struck) -> None:
        kills["all"] += 1
        print(struck.line(kills["all"]), flush=True)

    number = 0
    while kills["all"] < count:
        number += 1
        for name in configurations:
            if kills["all"] >= count:
                break
            if name not in chains:
                run, timeline = undisturbed(CONFIGURATIONS[name], folder / "data", folder / f"{name}-undisturbed")
                chains[name] = Chain(run.configuration, run, timeline, told)
                print(f"     {name} undisturbed: {timeline.ended:.1f} s", flush=True)
            planned = drawn_kills(seed, name, number, min(MOST_KILLS, count - kills["all"]))
            struck, end = chains[name].carry_out(folder / f"{name}-{number}", number, planned)
            differs = f"DIFFERS: {'; '.join(end.differences)}" if end.differences else "the undisturbed end"
            print(f"     {name} run {number}: {end.lives} lives, {end.refused} refused: {differs}", flush=True)
            yield struck, end


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="kills in all (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="that moments and targets are drawn from (default: 1)")
    parser.add_argument(
        "--configurations",
        nargs="+",
        default=list(CONFIGURATIONS),
        choices=list(CONFIGURATIONS),
        metavar="NAME",
        help=f"some of {', '.join(CONFIGURATIONS)} (default: all)",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON (default: docs/results/kills.json)")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count {options.count} is out of range: allowed is at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
