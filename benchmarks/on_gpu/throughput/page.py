"""The verdict and the tables of the part `throughput`."""

from __future__ import annotations

from typing import Any

from benchmarks.on_gpu.table import NOT_MEASURED, Found, gib, table

from .cases import CASES, PUBLISHED, TOY, Case

__all__ = ["is_good", "tables", "verdict"]

HEAD = (
    "BERT",
    "tokens",
    "compiled",
    "micro-batch",
    "sequences/s",
    "published, one A100-80",
    "MFU",
    "peak memory",
    "planned",
)


def verdict(found: Found) -> str:
    """One line: the faster of compiled and not, by model and length, and what did not fit."""
    cases, parts = found.get("cases", {}), []
    for size, length in dict.fromkeys((case.size, case.length) for case in CASES):
        measured = [
            one for case in CASES if (case.size, case.length) == (size, length) if (one := cases.get(case.name))
        ]
        fastest = max((one for one in measured if "seconds" in one), key=_speed, default=None)
        if fastest is not None:
            parts.append(f"{_model(size, length, found)}: {_line(fastest, _published(size, length, found))}")
    failed = [name for name, case in cases.items() if "failed" in case]
    if failed:
        failed[0] += f" ({cases[failed[0]]['failed']})"
    missing = [case.name for case in CASES if case.name not in cases]
    for what, names in (("failed:", failed), ("no time for", missing)):
        if names:
            parts.append(f"{what} {', '.join(names)}")
    return "; ".join(parts)


def is_good(found: Found) -> bool:
    """Whether a case was measured, and none failed."""
    cases = found.get("cases", {}).values()
    return any("seconds" in case for case in cases) and not any("failed" in case for case in cases)


def _model(size: str, length: int, found: Found) -> str:
    return f"toy {size}, {length // TOY.shortening} tokens" if found.get("toy") else f"BERT-{size}, {length} tokens"


def _published(size: str, length: int, found: Found) -> float | None:
    """What others have published for it; a toy is compared with nothing."""
    return None if found.get("toy") else PUBLISHED.get((size, length))


def _speed(case: dict[str, Any]) -> float:
    return float(case["sequences_per_second"])


def _line(case: dict[str, Any], published: float | None) -> str:
    line = f"{_speed(case):,.0f} sequences/s"
    if published:
        line += f" ({_speed(case) / published:.2f}x NVIDIA's {published:.0f} on an A100)"
    return line + (f", MFU {case['utilisation']:.0%}" if case.get("utilisation") is not None else "")


def tables(found: Found) -> str:
    """All cases, and the kernels of those that are short of half the peak, in Markdown."""
    cases = found.get("cases", {})
    measured = [case for case in CASES if "seconds" in cases.get(case.name, {})]
    if not measured:
        return NOT_MEASURED
    parts = [table(HEAD, [_row(case, cases.get(case.name, {}), found) for case in CASES])]
    for case in measured:
        if listed := cases[case.name].get("kernels"):
            parts.append(f"Kernels of {case.name}, one update:\n\n{_kernels(listed)}")
    return "\n\n".join(parts)


def _row(case: Case, one: dict[str, Any], found: Found) -> list[str]:
    published = _published(case.size, case.length, found)
    beside = "" if published is None else f"{published:.0f}"
    row = [case.size, str(case.length), "yes" if case.compiled else "no"]
    if "seconds" not in one:
        return [*row, "", one.get("failed", NOT_MEASURED), beside, "", "", ""]
    share, peak = one.get("utilisation"), one.get("peak_memory_bytes")
    return [
        *row,
        f"{one['micro_batch']:,}",
        f"{one['sequences_per_second']:,.0f}",
        beside,
        "" if share is None else f"{share:.1%}",
        "" if peak is None else gib(peak),
        gib(one["planned_bytes"]),
    ]


def _kernels(listed: list[dict[str, Any]]) -> str:
    rows = [[f"`{k['name']}`", f"{k['milliseconds']:.2f}", f"{k['share']:.1%}", f"{k['calls']:,}"] for k in listed]
    return table(("kernel", "ms", "share", "calls"), rows)
