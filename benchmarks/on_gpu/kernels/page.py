"""The verdict of the kernels' tests, and what the page says of them."""

from __future__ import annotations

from typing import Any

__all__ = ["hanging", "tables", "verdict"]


def verdict(found: dict[str, Any], seconds: float, *, stopped: bool = False) -> str:
    """One line: how many passed, what failed first, what there was no time for."""
    parts = [f"{found['passed']} passed"]
    if found["failed"]:
        first = found["failures"][0]
        message = (first["why"].splitlines() or [""])[0]
        parts.append(f"{found['failed']} failed (first: {first['test'].removeprefix('tests/gpu/')}: {message[:120]})")
    else:
        parts.append("0 failed")
    if found["skipped"]:
        parts.append(f"{found['skipped']} skipped")
    if found["not_reached"]:
        parts.append(f"{found['not_reached']} not reached{' in time' if stopped else ''}")
    return f"{', '.join(parts)}, in {seconds:.0f} s"


def hanging(running: dict[str, float], now: float, least: float) -> str:
    """Which tests have run longer than `least` seconds; "" if none has.

    Args:
        running: When each has begun, as `time.time()` has it.
        now: When they were stopped.
        least: Seconds.
    """
    long = {test: now - began for test, began in running.items() if now - began > least}
    said = [f"{test.removeprefix('tests/gpu/')}, running since {seconds:.0f} s" for test, seconds in long.items()]
    return f"stopped in test {' and '.join(said)}" if said else ""


def tables(found: dict[str, Any]) -> str:
    """A sentence for docs/benchmarks.md, and a list of what failed."""
    if "passed" not in found or not (found["passed"] or found["failed"]):
        return "not measured"
    sentence = f"`python -m pytest tests/gpu`: {verdict(found, found.get('seconds_of_tests', 0.0))}."
    failures = [f"- `{failure['test']}`: {_first_line(failure['why'])}" for failure in found["failures"]]
    return "\n".join([sentence, *(["", *failures] if failures else [])])


def _first_line(text: str) -> str:
    return text.splitlines()[0][:200] if text.strip() else "no reason is known"
