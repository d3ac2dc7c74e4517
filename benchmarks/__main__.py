"""Measures steps beside other packages' and writes docs/results/benchmarks.json and docs/benchmarks.md.

python -m benchmarks                      # everything, on a quiet machine: about 12 minutes on two cores
python -m benchmarks bert-base statistics # some parts; the others keep their old numbers
python -m benchmarks --page               # the page again, from the numbers there are
python -m benchmarks --smoke              # seconds, tiny sizes, writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import dense, growth, memory, sharded
from benchmarks.contenders import dense_contenders
from benchmarks.machine import copy_bandwidth, describe_machine
from benchmarks.on_gpu.page import benchmarks_section, found_in
from benchmarks.shapes import SHAPES, equal_layers
from benchmarks.tables import PARTS, markdown

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "results"
ROUNDS = 15
FEWER_ROUNDS = 9  # of whole updates
FEW_ROUNDS = 5  # of what takes seconds each


def measurements(device: str, *, smoke: bool) -> dict[str, Callable[[], Any]]:
    """What each part runs, by its name."""
    rounds, fewer, few = (2, 2, 2) if smoke else (ROUNDS, FEWER_ROUNDS, FEW_ROUNDS)
    bert = sharded.TINY_BERT if smoke else sharded.BERT
    shardings = ["ZeRO-2"] if smoke else list(sharded.ZERO)
    base, large = (SHAPES["bert-tiny"],) * 2 if smoke else (SHAPES["bert-base"], SHAPES["bert-large"])
    layer_counts = [10, 100] if smoke else [10, 100, 1000, 10_000]
    sizes = [10**6] if smoke else [10**6, 10**7, 10**8, 10**9]
    ranks = [1, 2] if smoke else [1, 2, 4, 8]
    tiny = equal_layers(100, 1600) if smoke else equal_layers(10_000, 160_000)
    elements = 10**6 if smoke else 1 << 24
    contenders = [c for c in dense_contenders(device) if not (smoke and c.compiles)]
    return {
        "bert-base": lambda: dense.measure_dense(base, device, rounds, contenders),
        "bert-large": lambda: dense.measure_dense(large, device, few if device == "cpu" else rounds, contenders),
        "tiny-layers": lambda: dense.measure_dense(tiny, device, rounds, contenders),
        "layers": lambda: growth.measure_growth_with_layers(layer_counts, elements, device, rounds),
        "parameters": lambda: growth.measure_growth_with_parameters(sizes, device, few),
        "ranks": lambda: sharded.measure_growth_with_ranks(ranks, [10, 100] if smoke else [10, 1000]),
        "zero": lambda: sharded.measure_zero(fewer, bert, shardings),
        "rivals": lambda: sharded.measure_rivals(rounds, bert),
        "statistics": lambda: sharded.measure_statistics(few, sequences=2 if smoke else 16, size=bert),
        "memory": lambda: memory.measure_memory(base, device, contenders),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page of old numbers")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="default: docs/results/benchmarks[_cuda].json; the page: beside it, or docs/",
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}; allowed are {', '.join(PARTS)}")
    if options.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for DeepSpeed, which is imported when it is measured
    if options.threads:
        torch.set_num_threads(options.threads)
    name = "benchmarks.json" if options.device == "cpu" else "benchmarks_cuda.json"
    out = (options.out or OUTPUT / name).resolve()
    results = json.loads(out.read_text()) if out.exists() and not options.smoke else {}
    if options.page:
        write_page(out, results)
        return
    machine = {
        **describe_machine(options.device),
        "copy_gigabytes_per_second": round(copy_bandwidth(options.device, 1 << (20 if options.smoke else 27)) / 1e9, 1),
    }
    for name, measure in measurements(options.device, smoke=options.smoke).items():
        if options.parts and name not in options.parts:
            continue
        results[name] = measure()
        results.setdefault("machines", {})[name] = machine
        title, table = PARTS[name]
        print(f"\n{title}\n\n{table(results[name])}", flush=True)
        if not options.smoke:
            out.write_text(dump(results))
            write_page(out, results)


def write_page(numbers: Path, results: dict[str, Any]) -> None:
    """Write the page of some numbers: beside them, but in docs/ for those in docs/results/."""
    page, text = page_of(numbers, results, benchmarks_section(found_in(numbers.with_name("gpu"))))
    page.write_text(text)


def page_of(numbers: Path, results: dict[str, Any], gpu: str) -> tuple[Path, str]:
    """Return the path of that page and its text, in which `gpu` stands under "On a GPU"."""
    folder = OUTPUT.parent if numbers.parent == OUTPUT else numbers.parent
    page = folder / f"{numbers.stem}.md"
    kills = numbers.with_name("kills.json")
    killed = json.loads(kills.read_text()) if kills.exists() else None
    return page, markdown(results, numbers.relative_to(folder).as_posix(), killed, gpu)


def dump(results: dict[str, Any]) -> str:
    """JSON with every list of numbers on one line."""
    text = json.dumps(results, indent=1)
    return re.sub(r"\[[-+.\deE\s,]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
