"""The verdict and the tables of the part `batch64k`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from benchmarks.on_gpu.table import NOT_MEASURED, Found, table

__all__ = ["best_runs", "is_good", "tables", "verdict"]

Run = dict[str, Any]

ASKED = ("lamb", "lans")
"""Optimizers for large batches: one that never learns is a fault, whatever AdamW does beside them."""

NAMED = 4
"""Runs in the verdict that are named, at most, of those that went wrong."""

SHOWN = 10
"""Updates between two columns of the curves."""


def is_whole(run: Run) -> bool:
    """Whether the run has done all of its updates, or diverged before."""
    return "validation_loss" in run and (
        len(run["losses"]) == run["asked_updates"] or not math.isfinite(run["losses"][-1])
    )


def has_diverged(run: Run) -> bool:
    """Whether a loss of it, in training or on held-out text, is no finite number."""
    return not all(map(math.isfinite, [*run["losses"], run.get("validation_loss", 0.0)]))


def has_learned(run: Run, *, toy: bool = False) -> bool:
    """Whether it came to its end with a loss below its first; a toy's few updates have to be finite alone."""
    return math.isfinite(final(run)) and not has_diverged(run) and (toy or run["losses"][-1] < run["losses"][0])


def final(run: Run) -> float:
    """The loss that runs are compared by: on held-out text, infinite for one that diverged or was ended."""
    loss = run.get("validation_loss", math.inf)
    return loss if is_whole(run) and math.isfinite(loss) else math.inf


def best_runs(runs: Iterable[Run]) -> list[Run]:
    """The best run of each optimizer and batch, of those that did not diverge."""
    best: dict[tuple[str, int], Run] = {}
    for run in runs:
        key = run["optimizer"], run["batch"]
        if math.isfinite(final(run)) and (key not in best or final(run) < final(best[key])):
            best[key] = run
    return list(best.values())


def is_good(found: Found) -> bool:
    """Whether those of `ASKED` that there was time for have each learned something, at least one, and none failed."""
    toy, runs = bool(found.get("toy")), found.get("runs", ())
    ended = {run["optimizer"] for run in runs if is_whole(run)}.intersection(ASKED)
    learned = {run["optimizer"] for run in runs if has_learned(run, toy=toy)}
    return bool(ended) and ended <= learned and not found.get("failed")


def verdict(found: Found) -> str:
    """One line: the best of each optimizer, and what did not fit."""
    runs = found.get("runs", [])
    batches = dict.fromkeys(run["batch"] for run in runs)
    parts = []
    for batch in batches:
        best = sorted((run for run in best_runs(runs) if run["batch"] == batch), key=final)
        shown = ", ".join(f"{run['optimizer']} {final(run):.3f} (lr {run['lr']:g})" for run in best)
        size = f"{'toy of ' if found.get('toy') else ''}{batch:,} sequences x {_updates(runs, batch)} updates"
        parts.append(f"{size}: {f'held-out loss {shown}' if shown else 'no run was finished'}")
    toy = bool(found.get("toy"))
    parts += [_named(what, some, len(runs)) for what, some in _unsound(runs, toy=toy).items() if some]
    if "unigram_entropy" in found:
        parts.append(f"unigram entropy {found['unigram_entropy']:.3f}")
    if failed := found.get("failed"):
        parts.append(f"failed: {', '.join(failed)}")
    if skipped := found.get("skipped"):
        parts.append(f"no time for {', '.join(skipped)}")
    return "; ".join(parts) or "no update was done"


def _unsound(runs: list[Run], *, toy: bool) -> dict[str, list[Run]]:
    """Runs that diverged, and whole ones whose loss did not fall."""
    diverged = [run for run in runs if has_diverged(run)]
    level = [run for run in runs if math.isfinite(final(run)) and not (has_diverged(run) or has_learned(run, toy=toy))]
    return {"diverged": diverged, "did not fall": level}


def _named(what: str, some: list[Run], count: int) -> str:
    names = ", ".join(f"{run['optimizer']} {run['lr']:g} at {run['batch']:,}" for run in some[:NAMED])
    return f"{len(some)} of {count} runs {what} ({names}{', ...' if len(some) > NAMED else ''})"


def _updates(runs: Iterable[Run], batch: int) -> int:
    return next(run["asked_updates"] for run in runs if run["batch"] == batch)


def tables(found: Found) -> str:
    """All runs, then the curves of the best, in Markdown."""
    runs = [run for run in found.get("runs", []) if run["losses"]]
    if not runs:
        return NOT_MEASURED
    head = ("batch", "optimizer", "rate", "updates", "training loss", "validation loss", "accuracy", "sequences/s")
    intro = (
        f"{found['model']} on {found['training_sequences']:,} sequences of {found['sequence_length']}, vocabulary "
        f"{found['vocabulary']:,}; unigram entropy {found['unigram_entropy']:.3f} nats."
    )
    return "\n\n".join([intro, table(head, map(_row, runs)), "Training loss of the best:", _curves(best_runs(runs))])


def _row(run: Run) -> list[str]:
    ended = "" if is_whole(run) else " (ended by the limit)"
    row = [f"{run['batch']:,}", run["optimizer"], f"{run['lr']:g}", f"{len(run['losses'])}{ended}"]
    row.append(f"{run['losses'][-1]:.3f}")
    if "validation_loss" not in run:
        return [*row, "", "", ""]
    shown = f"{run['validation_loss']:.3f}", f"{run['validation_accuracy']:.1%}", f"{run['sequences_per_second']:,.0f}"
    return [*row, *shown]


def _curves(runs: list[Run]) -> str:
    longest = max((len(run["losses"]) for run in runs), default=0)
    numbers = sorted({1, *range(SHOWN, longest + 1, SHOWN), longest} - {0})
    rows = [
        [f"{run['batch']:,}", run["optimizer"], f"{run['lr']:g}"]
        + [f"{run['losses'][n - 1]:.3f}" if n <= len(run["losses"]) else "" for n in numbers]
        for run in runs
    ]
    return table(("batch", "optimizer", "rate", *(f"update {n}" for n in numbers)), rows)
