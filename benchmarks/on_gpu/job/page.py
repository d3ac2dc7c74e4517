"""The verdict and the table of the part `job`."""

from __future__ import annotations

import math

from benchmarks.on_gpu.table import NOT_MEASURED, Found, gib, table

__all__ = ["is_good", "tables", "verdict"]

WARMUP = 6
"""Of a run the first of so many parts, in which the learning rate rises."""


def verdict(found: Found) -> str:
    """One line of what the run found so far."""
    if not found.get("losses"):
        return "no update was done"
    losses, asked = found["losses"], found["asked_updates"]
    stopped = "" if found["updates"] >= asked else f"stopped by the limit after {found['updates']} of {asked} updates: "
    fell = "" if losses[-1] < losses[0] else ", which did not fall"
    line = f"{stopped}loss {losses[0]:.3f} to {losses[-1]:.3f} in {found['updates']} updates{fell}"
    if "unigram_entropy" in found:
        line += f" (unigram entropy {found['unigram_entropy']:.3f})"
    if found.get("sequences_per_second"):
        line += f"; {found['sequences_per_second']:,.0f} sequences/s"
    return line + _memory(found)


def is_good(found: Found) -> bool:
    """Whether updates were done and their losses are finite and have fallen; within the warm-up that is not known."""
    losses = found.get("losses", ())
    if not losses or not all(map(math.isfinite, losses)):
        return False
    asked = found["asked_updates"]
    stopped_early = found["updates"] < asked and (len(losses) == 1 or found["updates"] <= asked // WARMUP)
    return stopped_early or losses[-1] < losses[0]


def _memory(found: Found) -> str:
    peak, promised = found.get("device_peak_memory_bytes"), found.get("promised")
    if not peak or not promised:
        return ""
    return f"; peak memory {gib(peak)}, promised {gib(promised['bytes'])} ({peak / promised['bytes']:.0%})"


def tables(found: Found) -> str:
    """The recipe's run, in Markdown."""
    if not found.get("losses"):
        return NOT_MEASURED
    rows = [["updates", f"{found['updates']} of {found['asked_updates']}"]]
    rows.append(["loss, first and last update", f"{found['losses'][0]:.3f}, {found['losses'][-1]:.3f}"])
    for validation in found.get("validations", ())[-1:]:
        rows.append(["validation loss", f"{validation['validation_loss']:.3f}"])
    rows.append(["unigram entropy", _number(found.get("unigram_entropy"), ".3f")])
    rows.append(["sequences/s, median", _number(found.get("sequences_per_second"), ",.0f")])
    peak, promised = found.get("device_peak_memory_bytes"), found.get("promised", {}).get("bytes")
    rows.append(["peak memory of tensors", gib(peak) if peak else NOT_MEASURED])
    rows.append(["promised by the plan", gib(promised) if promised else NOT_MEASURED])
    return f"`{found['command']}`\n\n{table(('', ''), rows)}"


def _number(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else format(value, form)
