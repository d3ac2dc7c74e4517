"""What the numbers of the steps say: one line for the summary, and tables for the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.contenders import BASELINE
from benchmarks.targets import NOT_MEASURED, ratio

__all__ = ["has_lamb", "tables", "verdict"]

Rows = dict[str, Any]
LAMB = "trustratio LAMB (triton)"
LARGE, BASE = "bert-large", "bert-base"
NAMES = {BASE: "BERT-base", LARGE: "BERT-large"}
RIVALS = {BASELINE: "AdamW fused", "DeepSpeed FusedLamb": "FusedLamb", "DeepSpeed FusedAdam": "FusedAdam"}
RIVALS |= {"apex FusedLAMB": "apex FusedLAMB"}
HEAD = (
    *("step", "ms (quartiles)", "over AdamW fused", "bytes per parameter", "share of a copy's speed"),
    *("from an idle device, ms", "host, ms", "kernels", "in a graph, ms"),
)


NOTE = (
    "The first time is that of the device while it is never idle, as in training; the second one begins on an idle "
    "device and has what the host is late with; the third is the host's, until `step()` returns. Bytes per parameter "
    "are those that the sweeps read and write ([kernels.md](kernels.md)), and their share is taken of a copy of the "
    "weights in the same rounds."
)


def verdict(found: Rows) -> str:
    """The line for the summary, made of what was measured."""
    large = _lamb(found, LARGE)
    said = [large or _lamb(found, BASE) or "LAMB was not measured", _bound_by(found), _graph(found), _troubles(found)]
    return "; ".join(part for part in said if part)


def has_lamb(found: Rows) -> bool:
    """Whether there are times of LAMB."""
    return any(_lamb(found, name) for name in NAMES)


def tables(found: Rows) -> str:
    """Markdown for the page: a table for each size, or that there is none."""
    sizes = {name: size for name, size in found.get("sizes", {}).items() if _rows(size)}
    if not sizes:
        return NOT_MEASURED
    return "\n\n".join(
        [_machine(found), NOTE, *(_size_table(_called(name, found), size) for name, size in sizes.items())]
    )


def _lamb(found: Rows, name: str) -> str:
    size = found.get("sizes", {}).get(name, {})
    row = _rows(size).get(LAMB, {})
    if "milliseconds" not in row:
        return ""
    told = f"LAMB {row['milliseconds']:.2f} ms at {_called(name, found)}"
    host = f"host {row['host']['milliseconds']:.2f} ms"
    if found.get("toy"):  # which says nothing of others
        return f"{told}; {host}"
    share = f"{100 * row['share_of_copy']:.0f} % of copy bandwidth" if "share_of_copy" in row else ""
    speeds = [f"{_speed(size, rival)} {called}" for rival, called in RIVALS.items() if _speed(size, rival)]
    return f"{told}: {', '.join(part for part in (share, *speeds) if part)}; {host}"


def _called(name: str, found: Rows) -> str:
    return f"a toy for {name}" if found.get("toy") else NAMES[name]


def _speed(size: Rows, rival: str) -> str:
    """Its time over LAMB's."""
    value = ratio(size, rival, LAMB)
    return f"{value[1]:.2f}x" if value else ""


def _bound_by(found: Rows) -> str:
    """Whose steps at BERT-base take the host longer than the device."""
    rows = _rows(found.get("sizes", {}).get(BASE, {}))
    slow = [name for name, row in rows.items() if name.startswith("trustratio") and host_is_late(row)]
    measured = [name for name, row in rows.items() if name.startswith("trustratio") and "milliseconds" in row]
    if not measured or found.get("toy"):
        return ""
    if not slow:
        return "host <= device at BERT-base"
    late = (f"{_short(n)} {rows[n]['host']['milliseconds']:.2f} > {rows[n]['milliseconds']:.2f} ms" for n in slow)
    return f"bound by Python at BERT-base: {', '.join(late)}"


def host_is_late(row: Rows) -> bool:
    """Whether a step takes longer to send than to do."""
    return "milliseconds" in row and row["host"]["milliseconds"] > row["milliseconds"]


def _graph(found: Rows) -> str:
    graph = found.get("sizes", {}).get(BASE, {}).get("graphs", {}).get(LAMB, {})
    if "milliseconds" not in graph:
        return ""
    return f"in a graph {graph['milliseconds']:.2f} ms there, host {graph['host_milliseconds']:.2f} ms"


def _troubles(found: Rows) -> str:
    """How much did not fit or failed, and who could not be had."""
    counts = {"did not fit": len(found.get("did_not_fit", ())), "failed": len(found.get("failed", {}))}
    troubles = [f"{count} {what}" for what, count in counts.items() if count]
    missing = sorted({name for size in found.get("sizes", {}).values() for name in _missing(size)})
    return ", ".join([*troubles, *([f"not there: {', '.join(missing)}"] if missing else [])])


def _rows(size: Rows) -> Rows:
    """Of all batches; of who is in several the first."""
    rows: Rows = {}
    for batch in size.get("batches", ()):
        rows = {**batch, **rows}
    return rows


def _missing(size: Rows) -> list[str]:
    return [name for name, row in _rows(size).items() if "missing" in row]


def _machine(found: Rows) -> str:
    facts = ", ".join(f"{k} {v}" for k, v in found.get("machine", {}).items() if k != "device")
    speed = f"a copy of 1 GiB moves {found['copy_bytes_per_second'] / 1e9:,.0f} GB/s" if _has_copy(found) else ""
    parts = (f"{found.get('machine', {}).get('device', '')}; {facts}", speed)
    return "; ".join(part for part in parts if part) + "."


def _has_copy(found: Rows) -> bool:
    return "copy_bytes_per_second" in found


def _size_table(name: str, size: Rows) -> str:
    rows = _rows(size)
    times = sorted((row["milliseconds"], who) for who, row in rows.items() if "milliseconds" in row)
    lines = [_line(who, rows[who], size.get("graphs", {}).get(who, {})) for _, who in times]
    lines += [[who, NOT_MEASURED, _first_line(rows[who]["missing"]), *[""] * (len(HEAD) - 3)] for who in _missing(size)]
    head = [list(HEAD), ["---"] * len(HEAD)]
    size_line = f"{name}: {size['elements']:,} parameters in {size['layers']} layers and {size['groups']} groups."
    return "\n".join([size_line, "", *(f"| {' | '.join(line)} |" for line in [*head, *lines])])


def _line(who: str, row: Rows, graph: Rows) -> list[str]:
    spread = f"{row['milliseconds']:.2f} ({row['milliseconds_low']:.2f} to {row['milliseconds_high']:.2f})"
    return [
        who,
        spread,
        f"{row['ratio']:.2f}",
        _number(row, "bytes_per_parameter", "{:.0f}".format),
        _number(row, "share_of_copy", "{:.2f}".format),
        _number(row["alone"], "milliseconds", "{:.2f}".format),
        _number(row["host"], "milliseconds", "{:.2f}".format),
        _number(row.get("launches", {}), "kernels", str),
        _number(graph, "milliseconds", "{:.2f}".format),
    ]


def _number(row: Rows, key: str, written: Callable[[Any], str]) -> str:
    return written(row[key]) if key in row else "–"


def _first_line(text: str) -> str:
    return text.splitlines()[0][:90].replace("|", "\\|")


def _short(name: str) -> str:
    """Without package and implementation."""
    return name.removeprefix("trustratio ").partition(" (")[0]
