"""What the sharded runs say: one line for the summary, and tables for the page."""

from __future__ import annotations

from typing import Any

from benchmarks.targets import NOT_MEASURED

__all__ = ["is_good", "tables", "verdict"]

Found = dict[str, Any]
HEAD = ("sharding, optimizer", "error of the weights' change", "error of ratios", "collectives in a `step()` call", "")


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
    return bool(judged) and all(judged) and not _failures(found) and not found.get("memcheck", {}).get("errors")


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
    """Settings that could not be had where all have to be, and why."""
    crews = {name: rows for name, rows in found.get("crews", {}).items() if name not in found.get("optional", ())}
    return [(name, row["missing"]) for rows in crews.values() for name, row in rows.items() if "missing" in row]


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
