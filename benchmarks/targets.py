"""What the step is meant to cost, beside what was measured: the first table of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from benchmarks.contenders import BASELINE, COPY
from benchmarks.timing import quartiles

__all__ = ["NOT_MEASURED", "TARGETS", "Result", "batches", "ratio", "targets_section"]

Rows = dict[str, Any]
Quartiles = tuple[float, float, float]

NOT_MEASURED = "not measured"
LAMB_BYTES, COPY_BYTES = 40, 8  # per parameter, read and written
BLOCK_BYTES = 33 / 16384  # per parameter: what a sweep notes per block, see docs/kernels.md
REASONS = {
    "lamb": "LAMB has to move 40 bytes per parameter where AdamW moves 28, 1.43 times as many. Above that: a layer "
    "that does not fit into the cache, such as the word embedding, is read twice; LAMB's arithmetic counts where "
    "AdamW is fast; and so does what the contender before has left in the caches ([kernels.md](kernels.md)).",
    "lars": "LARS moves as many bytes as AdamW, or fewer where its second sweep finds a layer in cache. In rounds in "
    "which AdamW gets more bandwidth, LARS gains less; and what the contender before has left in the caches counts "
    "([kernels.md](kernels.md)).",
    "peer": "In this run the target asks for a LAMB step in {needed} of fused AdamW's time, where the bytes alone ask "
    "for 1.43.",
    "tiny": "Layers of a few numbers cost work per tensor, not memory traffic.",
    "statistics": "VRLAMB reduces statistics beside gradients: the collectives and bytes are in the table below.",
    "memory": "The step takes memory that grows with the number of elements.",
    "gpu": "The step moves its bytes at less than the speed of a copy.",
}


@dataclass(frozen=True)
class Result:
    """What a target's row says.

    Attributes:
        text: The number with its spread, or why there is none.
        met: None if it was not measured.
    """

    text: str
    met: bool | None = None


@dataclass(frozen=True)
class Target:
    """One row; `reason` is the entry of `REASONS` that explains why it may fall short."""

    work: str
    bound: str
    measure: Callable[[Rows], Result]
    reason: str
    device: str = ""


def targets_section(results: Rows) -> str:
    """The table of targets, and why some are not met."""
    measured = [(target, _measure(target, results)) for target in TARGETS]
    words = {True: "met", False: "**short**", None: NOT_MEASURED}
    lines = [f"| {t.work} | {t.bound} | {r.text} | {words[r.met]} |" for t, r in measured]
    needed = _needed(results)
    reasons = [f"- {t.work}: {REASONS[t.reason].format(needed=needed)}" for t, r in measured if r.met is False]
    head = "| work | target | result, median (quartiles) | |\n| --- | --- | --- | --- |"
    why = ["", "Why some fall short:", "", *reasons] if reasons else []
    return "\n".join(["## Targets", "", head, *lines, *why])


def batches(part: Rows) -> list[Rows]:
    """Rows of each batch of a dense part; only those of one batch had common rounds."""
    return part.get("batches") or ([part["rows"]] if "rows" in part else [])


def ratio(part: Rows, numerator: str, denominator: str) -> Quartiles | None:
    """Quartiles of the ratio, round by round, over all batches that hold both."""
    holding = [rows for rows in batches(part) if all("ratio" in rows.get(n, {}) for n in (numerator, denominator))]
    each = [zip(rows[numerator]["each"], rows[denominator]["each"], strict=True) for rows in holding if _all_each(rows)]
    if each:
        return quartiles([own / other for own, other in chain.from_iterable(each)])
    if holding and denominator == BASELINE:
        row = holding[0][numerator]
        return row["ratio_low"], row["ratio"], row["ratio_high"]
    return None


def _all_each(rows: Rows) -> bool:
    return all("each" in row for row in rows.values() if "ratio" in row)


def _measure(target: Target, results: Rows) -> Result:
    names = {name for part in results.values() for rows in batches(part) for name in rows}
    device = "GPU" if any("(triton)" in name for name in names) else "CPU"
    if target.device and target.device != device:
        return Result(f"{NOT_MEASURED}: no {target.device} in this run")
    return target.measure(results)


def _judge(value: Quartiles | None, good: Callable[[float], bool], note: str = "") -> Result:
    if value is None:
        return Result(NOT_MEASURED)
    low, middle, high = value
    return Result(f"{middle:.2f} ({low:.2f} to {high:.2f}){note}", good(middle))


def _at_most(bound: float, part: str, numerator: str, denominator: str) -> Callable[[Rows], Result]:
    return lambda results: _judge(ratio(results.get(part, {}), numerator, denominator), lambda value: value <= bound)


def _at_least(bound: float, part: str, numerator: str, denominator: str) -> Callable[[Rows], Result]:
    return lambda results: _judge(ratio(results.get(part, {}), numerator, denominator), lambda value: value >= bound)


def _peers(results: Rows, denominator: str) -> dict[str, Quartiles]:
    """LAMBs of other packages on BERT-base, their time over the denominator's."""
    part = results.get("bert-base", {})
    names = {n for rows in batches(part) for n, row in rows.items() if row["kind"] == "lamb" and "trustratio" not in n}
    found = {name: ratio(part, name, denominator) for name in sorted(names)}
    return {name: value for name, value in found.items() if value is not None}


def _fastest_peer(results: Rows) -> Result:
    peers = _peers(results, "trustratio LAMB (cpu)")
    if not peers:
        return Result(NOT_MEASURED)
    name = min(peers, key=lambda peer: peers[peer][1])
    return _judge(peers[name], lambda value: value >= 5, f", {name}")


def _needed(results: Rows) -> str:
    """Over fused AdamW, the time of a LAMB that is five times as fast as the fastest peer's."""
    peers = _peers(results, BASELINE)
    return f"{min(value[1] for value in peers.values()) / 5:.2f}" if peers else NOT_MEASURED


def _bandwidth_share(results: Rows) -> Result:
    copies = ratio(results.get("bert-large", {}), COPY, "trustratio LAMB (triton)")
    share = LAMB_BYTES / COPY_BYTES
    scaled = None if copies is None else (copies[0] * share, copies[1] * share, copies[2] * share)
    return _judge(scaled, lambda value: value >= 0.85)


def _statistics(results: Rows) -> Result:
    part = results.get("statistics", {})
    row = part.get("rows", {}).get("ZeRO-2", {}).get("VRLAMB")
    value = (row["ratio_low"], row["ratio"], row["ratio_high"]) if row and part["accumulation"] == 8 else None
    return _judge(value, lambda middle: middle <= 1.15)


def _memory(results: Rows) -> Result:
    part = results.get("memory", {})
    rows = {name: row for name, row in part.get("rows", {}).items() if name.startswith("trustratio")}
    rows = {name: row for name, row in rows.items() if "eager" not in name and "bytes_half" in row}
    if not rows:
        return Result(NOT_MEASURED)
    more = part["elements"] - part["elements_half"]
    growth = {name: (row["bytes"] - row["bytes_half"]) / more for name, row in rows.items()}
    text = "; ".join(f"{n}: {row['bytes']:,} bytes, {growth[n]:.5f} per further parameter" for n, row in rows.items())
    return Result(text, max(growth.values()) <= BLOCK_BYTES)


TARGETS = [
    Target(
        "CPU, BERT-base: LAMB / torch AdamW fused",
        "≤ 1.5",
        _at_most(1.5, "bert-base", "trustratio LAMB (cpu)", BASELINE),
        "lamb",
        "CPU",
    ),
    Target(
        "CPU, BERT-base: LARS / torch AdamW fused",
        "≤ 1.1",
        _at_most(1.1, "bert-base", "trustratio LARS (cpu)", BASELINE),
        "lars",
        "CPU",
    ),
    Target("CPU, BERT-base: fastest peer LAMB / ours", "≥ 5", _fastest_peer, "peer", "CPU"),
    Target(
        "CPU, 10,000 tiny layers: LAMB / torch AdamW foreach",
        "≤ 1.0",
        _at_most(1.0, "tiny-layers", "trustratio LAMB (cpu)", "torch AdamW foreach"),
        "tiny",
        "CPU",
    ),
    Target(
        "GPU, BERT-large: LAMB at 40 B/param, share of a copy's bandwidth", "≥ 0.85", _bandwidth_share, "gpu", "GPU"
    ),
    Target(
        "GPU, BERT-large: DeepSpeed FusedLamb / LAMB",
        "≥ 1.5",
        _at_least(1.5, "bert-large", "DeepSpeed FusedLamb", "trustratio LAMB (triton)"),
        "gpu",
        "GPU",
    ),
    Target(
        "GPU, BERT-large: torch AdamW fused / LAMB",
        "≥ 0.67",
        _at_least(0.67, "bert-large", BASELINE, "trustratio LAMB (triton)"),
        "gpu",
        "GPU",
    ),
    Target("extra memory of a step", "O(layers)", _memory, "memory"),
    Target("ZeRO-2, accumulation 8: whole update, VRLAMB / LAMB", "≤ 1.15", _statistics, "statistics"),
]
