"""Markdown tables of the results, one function per part; `docs/benchmarks.md` is made of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.on_gpu.table import table
from benchmarks.targets import NOT_MEASURED, batches, targets_section

__all__ = ["PARTS", "markdown"]

Rows = dict[str, Any]


def markdown(results: Rows, numbers: str, kills: Rows | None = None, gpu: str | None = None) -> str:
    """The page of all parts that `results` holds, with a link to the file of `numbers`; of kills and a GPU if any."""
    sections = [f"## {title}\n\n{table(results[name])}" for name, (title, table) in PARTS.items() if name in results]
    head = (
        "# Benchmarks\n\n"
        f"Made by `python -m benchmarks`; the numbers are in [{numbers}]({numbers}). All contenders of a "
        "table ran in turn in one process (or one set of ranks); times are medians with quartiles, ratios are medians "
        "of the ratios round by round.\n\n"
        f"{_machines(results['machines'])}"
    )
    if kills is not None:
        sections.append(f"## Killed runs\n\n{kills_section(kills)}")
    if gpu is not None:
        sections.append(f"## On a GPU\n\n{gpu}")
    return "\n\n".join([head, targets_section(results), *sections]) + "\n"


def _machines(machines: dict[str, Rows]) -> str:
    """One line per machine (and load, and versions), with the parts that were measured on it."""
    parts: dict[str, list[str]] = {}
    for name, machine in machines.items():
        facts = ", ".join(f"{fact} {value}" for fact, value in machine.items() if fact != "device")
        parts.setdefault(f"{machine['device']}; {facts}", []).append(name)
    return "\n".join(f"- {', '.join(names)}: {machine}." for machine, names in parts.items())


def _time(row: Rows) -> str:
    return f"{row['milliseconds']:.1f} ({row['milliseconds_low']:.1f} to {row['milliseconds_high']:.1f})"


def _ratio(row: Rows) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


STEP_HEAD = ("step, ms", "over AdamW's", "collectives in it", "bytes in it")


def _step(row: Rows) -> list[str]:
    """The optimizer's step alone."""
    if "optimizer_step" not in row:
        return [NOT_MEASURED] * len(STEP_HEAD)
    step = row["optimizer_step"]
    return [_time(step), _ratio(step), str(row["optimizer_collectives"]), f"{row['optimizer_bytes']:,}"]


def dense_table(part: Rows) -> str:
    """Time and ratio of every contender, one table per batch."""
    size = f"{part['elements']:,} parameters in {part['layers']:,} layers."
    several = len(batches(part)) > 1
    note = " Memory does not hold all contenders at once: compare times within a table." if several else ""
    return "\n\n".join([size + note, *map(_batch_table, batches(part))])


def _batch_table(rows: Rows) -> str:
    lines = sorted((r["milliseconds"], name) for name, r in rows.items() if "missing" not in r)
    found = [[name, _time(rows[name]), _ratio(rows[name])] for _, name in lines]
    absent = [[name, "–", r["missing"].splitlines()[0][:90]] for name, r in rows.items() if "missing" in r]
    head = ("step", "milliseconds (quartiles)", "over torch AdamW fused (quartiles)")
    return table(head, found + absent)


def layers_table(part: Rows) -> str:
    """Milliseconds by number of layers."""
    return _growth_table("layers", part)


def parameters_table(part: Rows) -> str:
    """Milliseconds by number of parameters."""
    return _growth_table("parameters", part)


def _growth_table(what: str, part: Rows) -> str:
    names = list(next(p["rows"] for p in part.values() if "rows" in p))
    lines = []
    for size, measured in part.items():
        rows = measured.get("rows", {})
        missing = measured.get("missing", "–")
        lines.append([f"{int(size):,}", *(_time(rows[n]) if "ratio" in rows.get(n, {}) else missing for n in names)])
    return table((what, *(f"{name}, ms" for name in names)), lines)


def zero_table(part: Rows) -> str:
    """Engine steps and whole updates under ZeRO."""
    lines = [
        [sharding, name, *_step(r), _time(r), _ratio(r), str(r["collectives"]), f"{r['bytes']:,}"]
        for sharding, rows in part.items()
        for name, r in rows.items()
    ]
    whole = ("whole update, ms", "over AdamW's", "collectives", "bytes per rank")
    return table(("sharding", "optimizer", *STEP_HEAD, *whole), lines)


def statistics_table(part: Rows) -> str:
    """Whole updates with and without gradient statistics."""
    lines = [
        [sharding, name, _time(r), _ratio(r), str(r["collectives"]), f"{r['bytes']:,}"]
        for sharding, rows in part["rows"].items()
        for name, r in rows.items()
    ]
    head = ("sharding", "optimizer", "update, ms", "over LAMB", "collectives", "bytes per rank")
    note = f"Accumulation {part['accumulation']}, {part['sequences_per_micro_batch']} sequences of 64 per micro-batch."
    return f"{note}\n\n{table(head, lines)}"


def rivals_table(part: Rows) -> str:
    """Exact sharded LAMBs."""
    lines = [[name, *_step(r), _time(r)] for name, r in part.items()]
    return table(("", *STEP_HEAD, "whole update, ms"), lines)


def ranks_table(part: Rows) -> str:
    """Collectives and bytes of a LAMB step."""
    lines = [
        [ranks, f"{int(layers):,}", str(r["collectives"]), f"{r['bytes']:,}"]
        for ranks, rows in part.items()
        for layers, r in rows.items()
    ]
    return table(("ranks", "layers", "collectives per step", "bytes per rank"), lines)


def memory_table(part: Rows) -> str:
    """Peak memory of a step."""
    lines = [
        [name, _megabytes(r["bytes"]), f"{r['bytes'] / part['elements']:.3f}", _megabytes(r.get("bytes_half"))]
        for name, r in part["rows"].items()
        if "bytes" in r
    ]
    head = ("step", "MB above parameters, gradients and state", "bytes per parameter", "MB, half the parameters")
    return f"{part['elements']:,} parameters in {part['layers']:,} layers.\n\n{table(head, lines)}"


def _megabytes(number: int | None) -> str:
    return NOT_MEASURED if number is None else f"{number / 1e6:,.3f}"


PARTS = {
    "bert-base": ("A step on BERT-base's shapes", dense_table),
    "bert-large": ("A step on BERT-large's shapes", dense_table),
    "tiny-layers": ("A step on 10,000 tiny layers", dense_table),
    "layers": ("Growth with the number of layers", layers_table),
    "parameters": ("Growth with the number of parameters", parameters_table),
    "ranks": ("Growth with ranks: collectives of a LAMB step under FSDP2", ranks_table),
    "zero": ("Engine steps and whole updates under DeepSpeed ZeRO, 2 ranks", zero_table),
    "rivals": ("Exact sharded LAMBs, 2 ranks", rivals_table),
    "statistics": ("The price of gradient statistics, 2 ranks", statistics_table),
    "memory": ("Extra memory of a step", memory_table),
}


def kills_section(results: Rows) -> str:
    """What `python -m benchmarks.kills` does, and what came out."""
    machine = results["machine"]
    return (
        f"`python -m benchmarks.kills --count {len(results['kills'])} --seed {results['seed']}`: small runs of the "
        "BERT recipes (two ranks; preparation of data, 16 updates in two phases with dropout, four checkpoints, "
        "report) are killed by SIGKILL and started again with the same command line, `--output DIR --resume auto`, up "
        "to six times each, until they end with status 0. Moments are drawn from the seed: some over a run's whole "
        "length, others aimed. Then every tensor and number of the last checkpoint, the exported model, each line of "
        "`metrics.jsonl` but for times and memory, and the steps of the report have to be those of a run that nobody "
        "disturbed, bit for bit; and no process, shared memory, temporary file or partial folder may be left. Every "
        "kill is in [results/kills.json](results/kills.json).\n\n"
        f"{machine['device']}; python {machine['python']}, torch {machine['torch']}, deepspeed "
        f"{machine.get('deepspeed', 'not installed')}.\n\n{kills_table(results)}"
    )


def kills_table(results: Rows) -> str:
    """Kills and ends by configuration, by moment and by what was killed."""
    kills, ends = results["kills"], results["ends"]
    lines = []
    for name in dict.fromkeys(end["configuration"] for end in ends):
        of_it = [end for end in ends if end["configuration"] == name]
        same = sum(not end["differences"] for end in of_it)
        counted = str(sum(kill["configuration"] == name for kill in kills))
        lines.append([name, counted, str(len(of_it)), str(same), str(sum(end["refused"] for end in of_it))])
    head = ("configuration", "kills", "runs", "with the undisturbed end", "starts refused while a rank still wrote")
    by_moment = Counter(kill["moment"] for kill in kills)
    by_target = Counter(" and ".join(kill["killed"]) for kill in kills)
    counts = [
        table((what, "kills"), [[name, str(n)] for name, n in counted.most_common()])
        for what, counted in (("moment", by_moment), ("killed", by_target))
    ]
    waits = [kill["until_gone"] for kill in kills if kill["until_gone"] is not None]
    longest = f"All processes of a run were gone at most {max(waits):.0f} s after a kill." if waits else ""
    return "\n\n".join([table(head, lines), *counts, longest]).strip()
