"""The tables of docs/sixteen_bits.md, each between its marks in the page."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.contenders import BASELINE
from benchmarks.sixteen_bits.peers import PEERS, WITHOUT_RATIO
from benchmarks.sixteen_bits.training import OPTIMIZERS, SEEDS, TRAININGS
from benchmarks.sixteen_bits.variants import VARIANTS

__all__ = ["TABLES", "filled", "write_page"]

Results = dict[str, Any]
NOT_MEASURED = "not measured"
MOMENTS = {"second_moment_unmoved", "second_moment_mean_root"}


def write_page(results: Results, page: Path) -> None:
    """Put the tables of `results` into the page."""
    page.write_text(filled(page.read_text(encoding="utf-8"), results), encoding="utf-8")


def filled(text: str, results: Results) -> str:
    """The page's text with the tables of `results`; a part without numbers keeps what it has."""
    for name, table in TABLES.items():
        if name not in results:
            continue
        before, rest = text.split(mark(name, "begins"))
        _, after = rest.split(mark(name, "ends"))
        text = f"{before}{mark(name, 'begins')}\n{table(results)}\n{mark(name, 'ends')}{after}"
    return text


def mark(name: str, where: str) -> str:
    """What stands before ("begins") and after ("ends") a table."""
    return f"<!-- {name} {where} -->"


def step_table(results: Results) -> str:
    """Milliseconds, ratios and what has to be moved."""
    part = results["step"]
    lines = [
        [
            shapes,
            name,
            f"{row['milliseconds']:.1f} ({row['milliseconds_low']:.1f} to {row['milliseconds_high']:.1f})",
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
            str(row["moved"]),
            f"{row['moved'] / found['rows'][BASELINE]['moved']:.2f}",
        ]
        for shapes, found in part["shapes"].items()
        for name, row in found["rows"].items()
    ]
    head = ("shapes", "step", "ms (quartiles)", "over AdamW (quartiles)", "bytes per parameter", "of AdamW's")
    return f"{_machine(part['machine'])}\n\n{_table(head, lines)}"


def memory_table(results: Results) -> str:
    """Bytes per parameter."""
    part = results["memory"]
    lines = [
        [name, f"{row['weights_and_gradients']:.2f}", f"{row['state']:.2f}", f"{sum(row.values()):.2f}"]
        for name, row in part["rows"].items()
    ]
    note = f"{part['elements']:,} parameters in {part['layers']:,} layers; bytes per parameter."
    return f"{note}\n\n{_table(('', 'weights and gradients', 'state', 'together'), lines)}"


def training_table(results: Results) -> str:
    """Final validation losses: mean over the seeds and half the range, and what changed beside fp32 seed by seed."""
    part = results["training"]
    tables = [_training_table(part, size) for size in TRAININGS if size in part["unigram_entropy"]]
    return "\n\n".join([*tables, *_moments_tables(part["runs"])])


def _training_table(part: Results, size: str) -> str:
    settings = TRAININGS[size]
    note = (
        f"{size}: {settings.updates} updates of {settings.batch} sequences of {settings.length} tokens; guessing by "
        f"the frequencies of tokens alone has {part['unigram_entropy'][size]:.3f} nats."
    )
    lines = []
    for variant in VARIANTS:
        cells = [_losses(part["runs"], size, optimizer, variant) for optimizer in OPTIMIZERS]
        lines.append([variant, *(text for pair in cells for text in pair)])
    head = ["", *(text for name in OPTIMIZERS for text in (f"{name}, nats", "beside fp32"))]
    return f"{note}\n\n{_table(head, lines)}"


def _losses(runs: Results, size: str, optimizer: str, variant: str) -> tuple[str, str]:
    losses = [_loss(runs, size, optimizer, variant, seed) for seed in SEEDS]
    found = [loss for loss in losses if loss is not None]
    if not found:
        return NOT_MEASURED, NOT_MEASURED
    plain = [_loss(runs, size, optimizer, next(iter(VARIANTS)), seed) for seed in SEEDS]
    pairs = zip(losses, plain, strict=True)
    more = [one - other for one, other in pairs if one is not None and other is not None]
    seeds = "" if len(found) == len(SEEDS) else f" ({len(found)} of {len(SEEDS)} seeds)"
    beside = "" if variant == next(iter(VARIANTS)) or not more else _spread(more, "+")
    return _spread(found) + seeds, beside


def _loss(runs: Results, size: str, optimizer: str, variant: str, seed: int) -> float | None:
    loss: float | None = runs.get(f"{size}, {optimizer}, {variant}, seed {seed}", {}).get("loss")
    return loss


def _spread(values: list[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"


def _moments_tables(runs: Results) -> Iterator[str]:
    """What became of the second moments in the runs, if there is any that tells."""
    plain = next(iter(VARIANTS))
    lines = []
    for size, optimizer in itertools.product(TRAININGS, OPTIMIZERS):
        of_fp32 = _moments(runs, size, optimizer, plain)
        for variant in (name for name in VARIANTS if name.startswith("fp32 weights")):
            found = _moments(runs, size, optimizer, variant)
            if found and of_fp32:
                lines.append([size, optimizer, variant, f"{found[0]:.1%}", f"{found[1] / of_fp32[1]:.3f}"])
    if lines:
        head = ("", "", "", "second moments that the last update left", "mean root over that of fp32")
        yield f"Adam's second moments at the end of these runs:\n\n{_table(head, lines)}"


def _moments(runs: Results, size: str, optimizer: str, variant: str) -> tuple[float, float] | None:
    of_seeds = [runs.get(f"{size}, {optimizer}, {variant}, seed {seed}", {}) for seed in SEEDS]
    found = [(run["second_moment_unmoved"], run["second_moment_mean_root"]) for run in of_seeds if set(run) >= MOMENTS]
    if not found:
        return None
    unmoved, roots = zip(*found, strict=True)
    return statistics.mean(unmoved), statistics.mean(roots)


def peers_table(results: Results) -> str:
    """State, time and loss beside other packages."""
    part = results["peers"]
    runs = results.get("training", {}).get("runs", {})
    lines = []
    for name, row in part["steps"].items():
        peer = PEERS[name]
        if "missing" in row:
            lines.append([name, row["missing"], "–", "–", peer.ratio])
            continue
        is_timed = "milliseconds" in row
        ratio = f"{row['milliseconds']:.1f}, {row['ratio']:.1f} times" if is_timed else NOT_MEASURED
        ratio_word = f"none: {WITHOUT_RATIO[name]}'s steps" if part["without_ratio"].get(name) is True else peer.ratio
        lines.append([name, f"{row['state_bytes_per_parameter']:.2f}", ratio, _peer_loss(part, runs, name), ratio_word])
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items()) or "no other package"
    head = ("", "state, bytes per parameter", "a step, ms, over AdamW", "loss, nats", "trust ratio")
    return f"{versions}; torch {part['machine']['torch']}.\n\n{_table(head, lines)}"


def _peer_loss(part: Results, runs: Results, name: str) -> str:
    trained = PEERS[name].trained
    if trained is None:
        run = part["runs"].get(name, {})
    else:
        run = runs.get(f"tiny, {trained[0]}, {trained[1]}, seed {SEEDS[0]}", {})
    if "missing" in run:
        return str(run["missing"])
    return f"{run['loss']:.3f}" if "loss" in run else "–"


def standstill_table(results: Results) -> str:
    """Shares that did not move, and how far the second moment is from the gradients' variance."""
    part = results["standstill"]
    lines = [
        [
            beta2,
            name,
            *(f"{found['unmoved'][half]:.1%}" for half in (0, 1)),
            *(f"{found['second_moment'][half]:.3f}" for half in (0, 1)),
        ]
        for beta2, rows in part["rows"].items()
        for name, found in rows.items()
    ]
    half = f"{part['steps'] // 2:,}"
    note = (
        f"{part['elements']:,} second moments under normal gradients of variance 1 for {half} steps, then of a "
        f"{1 / part['fall']:.0f}th of the size for {half} more; means over the last hundred steps of each half."
    )
    left = ("left by a step, first half", "second half")
    mean = ("mean over the variance, first half", "second half")
    return f"{note}\n\n{_table(('β₂', 'kept in', *left, *mean), lines)}"


TABLES = {
    "step": step_table,
    "memory": memory_table,
    "training": training_table,
    "peers": peers_table,
    "standstill": standstill_table,
}


def _machine(machine: Results) -> str:
    facts = ", ".join(f"{fact} {value}" for fact, value in machine.items() if fact != "device")
    return f"{machine['device']}; {facts}."


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
