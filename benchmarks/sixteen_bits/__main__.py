"""What sixteen bits cost and save: steps, memory, losses of small trainings, other packages, and Adam's second moment.

    python -m benchmarks.sixteen_bits                         # everything: about half an hour on one core
    python -m benchmarks.sixteen_bits --parts step            # the times alone, on a quiet machine: minutes
    python -m benchmarks.sixteen_bits --parts training peers  # goes on where it was interrupted; --again starts anew
    python -m benchmarks.sixteen_bits --page                  # the tables again, from the numbers there are

Writes docs/results/sixteen_bits.json and the tables in docs/sixteen_bits.md. Other packages are measured where they are
installed: pip install --no-deps torchao==0.18.0 bitsandbytes==0.50.2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.__main__ import dump
from benchmarks.contenders import BASELINE
from benchmarks.machine import describe_machine
from benchmarks.shapes import SHAPES, bert_shapes
from benchmarks.sixteen_bits import memory, peers, standstill, steps, training
from benchmarks.sixteen_bits.page import write_page

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
PAGE = RESULTS.parent / "sixteen_bits.md"
PARTS = ("step", "memory", "training", "peers", "standstill")
PEER_SEED = training.SEEDS[0]
Results = dict[str, Any]
Keep = Callable[[], object]


def measure_step(results: Results, options: argparse.Namespace, keep: Keep) -> None:
    """Steps on BERT's shapes; with `--threads`, two if not given."""
    base, large = ("bert-tiny",) * 2 if options.smoke else ("bert-base", "bert-large")
    rounds = {"base": 2, "large": 2} if options.smoke else {"base": 21, "large": 11}
    torch.set_num_threads(1 if options.smoke else options.threads)
    machine = describe_machine(options.device)
    found = {
        "BERT-base": steps.measure_steps(SHAPES[base], options.device, rounds["base"]),
        "BERT-large": steps.measure_steps(SHAPES[large], options.device, rounds["large"]),
        "BERT-base, VRLAMB": steps.measure_variance_reduced(SHAPES[base], options.device, rounds["large"]),
    }
    results["step"] = {"machine": machine, "shapes": found}
    torch.set_num_threads(1)
    keep()


def measure_memory(results: Results, options: argparse.Namespace, keep: Keep) -> None:
    """What weights, gradients and state take."""
    shapes = SHAPES["bert-tiny" if options.smoke else "bert-base"]
    results["memory"] = {
        "machine": describe_machine(options.device),
        **memory.measure_memory(shapes, options.device),
    }
    keep()


def measure_training(results: Results, options: argparse.Namespace, keep: Keep) -> None:
    """Runs that are not finished yet."""
    part = _part(results, "training", options)
    trainings = _trainings(options)
    corpora = {name: training.Corpus(one) for name, one in trainings.items()}
    part["unigram_entropy"] = {name: corpus.unigram_entropy for name, corpus in corpora.items()}
    seeds = training.SEEDS[:1] if options.smoke else training.SEEDS
    for run in training.runs(trainings.values(), seeds):
        corpus = corpora[run.training.size]
        _once(part["runs"], run.name, run.settings, lambda run=run, corpus=corpus: run.carry_out(corpus), keep)  # type: ignore[misc]


def measure_peers(results: Results, options: argparse.Namespace, keep: Keep) -> None:
    """Other packages beside this one: a step, and the tiny training with one seed."""
    part = _part(results, "peers", options)
    names = [name for name in peers.PEERS if _is_installed(name)]
    tiny = _trainings(options)["tiny"]
    part["versions"] = peers.versions()
    shapes = bert_shapes(2, 128, tiny.vocabulary, tiny.length)
    part["steps"] = peers.peer_steps(names, shapes, rounds=2 if options.smoke else 21)
    part["without_ratio"] = {name: peers.same_steps(name) for name in peers.WITHOUT_RATIO if name in names}
    keep()
    corpus = training.Corpus(tiny)
    settings = training.Run(tiny, "", "", PEER_SEED).settings
    for name in names:
        if peers.PEERS[name].trained is None and name != BASELINE:
            _once(part["runs"], name, settings, lambda name=name: peers.measure_peer(name, corpus, PEER_SEED), keep)  # type: ignore[misc]


def measure_standstill(results: Results, options: argparse.Namespace, keep: Keep) -> None:
    """Adam's second moment when gradients fall."""
    results["standstill"] = standstill.measure_standstill(*((64, 8) if options.smoke else ()))
    keep()


MEASURES = dict(
    zip(PARTS, (measure_step, measure_memory, measure_training, measure_peers, measure_standstill), strict=True)
)


def _part(results: Results, name: str, options: argparse.Namespace) -> Results:
    """A part whose finished runs stay, unless all are to be done again."""
    if options.again or name not in results:
        results[name] = {"runs": {}}
    results[name]["machine"] = describe_machine("cpu")
    part: Results = results[name]
    return part


def _once(runs: Results, name: str, settings: Results, carry_out: Callable[[], Results], keep: Keep) -> None:
    """Do a run that is not among the finished ones with the same settings."""
    if runs.get(name, {}).get("settings") == settings:
        return
    began, processor = time.perf_counter(), time.process_time()
    found = carry_out()
    seconds = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - processor}
    runs[name] = {"settings": settings, **found, **seconds}
    print(f"{name}: {found.get('loss', found.get('missing'))} ({seconds['seconds']:.0f} s)", flush=True)
    keep()


def _trainings(options: argparse.Namespace) -> dict[str, training.Training]:
    if not options.smoke:
        return training.TRAININGS
    return {"tiny": replace(training.TRAININGS["tiny"], updates=3, batch=2, length=16, validation_sequences=4)}


def _is_installed(peer: str) -> bool:
    package = peer.split()[0]
    return package not in peers.PACKAGES or importlib.util.find_spec(package) is not None


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    out = (options.out or RESULTS / "sixteen_bits.json").resolve()
    results = json.loads(out.read_text()) if out.exists() and not options.smoke else {}

    def keep() -> None:
        if not options.smoke:
            whole = out.with_suffix(".new")  # an interruption leaves the old numbers
            whole.write_text(dump(results))
            whole.replace(out)

    for part in () if options.page else options.parts:
        began = time.perf_counter()
        MEASURES[part](results, options, keep)
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    if not options.smoke and out.parent == RESULTS:
        write_page(results, PAGE)


def _options(arguments: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sixteen_bits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="some of them (default: all)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=("cpu", "cuda"),
        help="of step and memory",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of step (default: 2); the rest has one")
    parser.add_argument("--again", action="store_true", help="do finished runs of training and peers again")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the tables of old numbers")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    parser.add_argument("--out", type=Path, help="default: docs/results/sixteen_bits.json, which the page is of")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.threads < 1:
        parser.error(f"--threads {options.threads} is out of range: allowed is at least 1")
    torch.set_num_threads(1)
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
