"""What the sharded runs say: one line for the summary, and tables for the page."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.targets import NOT_MEASURED

__all__ = ["is_good", "tables", "verdict"]

Found = dict[str, Any]
HEAD = ("sharding, optimizer", "error of the weights' change", "error of ratios", "collectives in a `step()` call", "")

OF_THE_DEVICE = re.compile(
    r"illegal memory access|CUDA error|misaligned address|device-side assert|launch failure", re.I
)
"""Errors that no backend of torch.distributed excuses."""
NOT_CARRIED = re.compile(
    r"not support|unsupported|not implemented|no backend type|must be CPU|invalid (tensor|device)", re.I
)
"""What gloo says of tensors on a device, and of collectives that it lacks."""

NOTE = (
    "Small training runs with injected gradients on one device, compared with a float64 reference in one process: "
    "relative errors of what the steps change, at most 2e-6, and of trust ratios. The single NCCL rank sends its sums "
    "to itself, which a step of one rank otherwise leaves out."
)


def verdict(found: Found) -> str:
    """The line for the summary: how many are exact, the worst error, what is not exact or could not be had."""
    rows = [row for crew in found.get("crews", {}).values() for row in crew.items()]
    compared = [(name, row) for name, row in rows if "error" in row]
    wrong = [name for name, row in compared if not row["exact"]]
    said = [f"{len(compared) - len(wrong)} of {len(compared)} exact to {found.get('bound', 2e-6):.0e}"]
    if compared:
        name, row = max(compared, key=lambda one: _size(one[1]["error"]))
        said.append(f"worst {row['error']:.1e} ({name})")
    said.append(f"NOT EXACT: {', '.join(wrong)}" if wrong else "")
    said += [f"failed: {name} ({_first_line(why)})" for name, why in _failures(found)[:1]]
    said.append(_missing([name for name, row in rows if "missing" in row], found))
    said.append(_memcheck(found.get("memcheck", {})))
    return "; ".join(part for part in said if part)


def is_good(found: Found) -> bool:
    """Whether something was compared, all of it is exact, nothing failed, and memcheck, if it ran, found nothing."""
    judged = [row["exact"] for crew in found.get("crews", {}).values() for row in crew.values() if "exact" in row]
    checked = found.get("memcheck", {})
    unsound = _failures(found) or checked.get("errors") or "failed" in checked
    return bool(judged) and all(judged) and not unsound


def tables(found: Found) -> str:
    """Markdown for the page: a table for each set of ranks, or that there is none."""
    crews = {name: rows for name, rows in found.get("crews", {}).items() if rows}
    if not crews:
        return NOT_MEASURED
    machine = found.get("machine", {})
    facts = ", ".join(f"{fact} {value}" for fact, value in machine.items() if fact != "device")
    parts = [NOTE, f"{machine.get('device', 'unknown device')}; {facts}."]
    parts += [f"{name[:1].upper()}{name[1:]}:\n\n{_table(rows)}" for name, rows in crews.items()]
    checked = _memcheck(found.get("memcheck", {}))
    return "\n\n".join([*parts, f"{checked}." if checked else "memcheck: not measured."])


def _failures(found: Found) -> list[tuple[str, str]]:
    """Settings that could not be had where all have to be, or for no reason that excuses it, and why."""
    crews, all_tried = found.get("crews", {}).items(), not found.get("did_not_fit")
    return [
        one
        for name, rows in crews
        for one in _failures_of(rows, optional=name in found.get("optional", ()), all_tried=all_tried)
    ]


def _failures_of(rows: Found, *, optional: bool, all_tried: bool) -> list[tuple[str, str]]:
    """Of one crew. In an optional one some settings may be missing; all of them only for what gloo does not carry."""
    missing = [(name, row["missing"]) for name, row in rows.items() if "missing" in row]
    if not optional:
        return missing
    excused = NOT_CARRIED if all_tried and len(missing) == len(rows) else re.compile("")
    return [(name, why) for name, why in missing if OF_THE_DEVICE.search(why) or not excused.search(why)]


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0][:120]


def _size(error: float) -> float:
    """An error that is no number is the largest."""
    return float("inf") if error != error else error


def _missing(names: list[str], found: Found) -> str:
    counts = {"could not be had": len(names), "did not fit": len(found.get("did_not_fit", ()))}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _memcheck(row: Found) -> str:
    if "errors" in row:
        return f"memcheck: {row['errors']} errors" + (f" ({row['first']})" if "first" in row else "")
    if "failed" in row:
        return f"memcheck: FAILED: {row['failed']}"
    return f"memcheck: {row['missing']}" if "missing" in row else ""


def _table(rows: Found) -> str:
    lines = [HEAD, ("---",) * len(HEAD), *(_line(name, row) for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(name: str, row: Found) -> tuple[str, ...]:
    if "error" not in row:
        said = _first_line(row["missing"]).replace("|", "\\|")
        return name, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED, said
    collectives = ", ".join(map(str, row["collectives"]))
    judged = "exact" if row["exact"] else f"**not exact**: {row['layer']}"
    return name, f"{row['error']:.1e}", f"{row['ratio_error']:.1e}", collectives, judged
