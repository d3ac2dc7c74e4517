"""The report of a run: one HTML page that needs nothing else, and pictures.

    python recipes/report.py runs/lamb-tiny-1

makes it for an existing run, finished or not; runs write their own when they end, however they end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trustratio.integrations.pages.template import filled_page, json_number, levels

from ..common.called import called, examples
from ..common.command import CommandParser, ends_with_message
from ..common.errors import RecipeError
from ..common.files import write_text
from .folder import CURVES, METRICS, RATIOS, REPORT
from .history import RunHistory, binned, bins, grows, load_history, short_name
from .plots import draw_curves, draw_ratios

_PAGE = Path(__file__).with_name("report_page.html")
_MOST_POINTS = 1000
_MOST_COLUMNS = 500


def write_report(folder: Path) -> str:
    """Write report.html, report.png and trust_ratios.png into a run's folder; return a line that says so.

    A report that cannot be made is a line, not an error: the run's results are in the folder all the same.
    """
    try:
        make_report(folder)
    except (RecipeError, OSError, ValueError, RuntimeError) as error:
        return f"no report: {error}"
    return f"report: {folder / REPORT}; metrics: {folder / METRICS}"


def make_report(folder: Path) -> None:
    """Write the three files.

    Raises:
        RecipeError: not a run's folder, or nothing was logged.
    """
    history = load_history(folder)
    page = filled_page(_PAGE, page_data(history))
    draw_curves(history, title(history), folder / CURVES)
    if history.layers:
        draw_ratios(history, title(history), folder / RATIOS)
    write_text(folder / REPORT, page)  # last: a page newer than the metrics says that the pictures are, too


def title(history: RunHistory) -> str:
    """Return one line: model, optimizer, batch and sharding."""
    model, training = history.config.get("model", {}), history.config.get("training", {})
    name = "ModernBERT" if model.get("architecture") == "modernbert" else "BERT"  # earlier releases' runs do not say
    parts = [
        f"{name} {model['layers']} × {model['hidden']}" if {"layers", "hidden"} <= set(model) else "",
        str(history.config.get("optimizer", {}).get("name", "")),
        f"{_batches(history)} sequences per step" if "global_batch" in training else "",
        f"ZeRO-{training['zero_stage']}" if "zero_stage" in training else "",
        f"ranks: {history.environment['ranks']}" if "ranks" in history.environment else "",
    ]
    return ", ".join(part for part in parts if part)


def _batches(history: RunHistory) -> str:
    """Return the batch, or the smallest and the largest that one which grows has had."""
    if not grows(history):
        return f"{history.config['training']['global_batch']:,}"
    batch = history.train["batch"]
    return f"{np.nanmin(batch[:-1], initial=batch[0]):,.0f} to {np.nanmax(batch):,.0f}"


def stage_table(folder: Path) -> Iterator[str]:
    """Yield the lines of a Markdown table: how long each stage of a run took, on its first rank.

    Raises:
        RecipeError: the run has not come to its end.
    """
    stages = load_history(folder).environment.get("stages")
    if not stages:
        raise RecipeError(f"{str(folder)!r} does not say how long its stages took: the run has not come to its end")
    yield "| stage | seconds | of processor time |"
    yield "|---|---|---|"
    for name, stage in stages.items():
        yield f"| {name} | {stage['seconds']:.1f} | {stage['cpu_seconds']:.1f} |"
    seconds, cpu_seconds = (sum(stage[kind] for stage in stages.values()) for kind in ("seconds", "cpu_seconds"))
    yield f"| together | {seconds:.1f} | {cpu_seconds:.1f} |"


def page_data(history: RunHistory) -> dict[str, Any]:
    """Return what the page shows, of a size that does not grow with the run."""
    return {
        "title": f"{history.config.get('preset', 'run')}: {history.name}",
        "subtitle": title(history),
        "notices": list(notices(history)),
        "tiles": list(_tiles(history)),
        "series": _train_series(history),
        "validation": _validation_series(history),
        "unigram": json_number(history.unigram_entropy),
        "ratios": _ratio_table(history),
        "tables": _tables(history),
        "footer": "Long runs are summed up: curves are means, with a band from the smallest to the largest value; "
        "trust ratios are medians. metrics.jsonl has every step.",
    }


def notices(history: RunHistory) -> Iterator[str]:
    """Yield what a reader must know first: a run that broke down or stopped early."""
    steps, losses = history.train["step"], history.train["loss"]
    broken = np.flatnonzero(~np.isfinite(losses))
    if broken.size:
        yield f"The loss was not finite at step {int(steps[broken[0]]):,}: the run diverged."
    yield from _ended_early(history)


def _ended_early(history: RunHistory) -> Iterator[str]:
    step, read = int(history.train["step"][-1]), history.train["sequences"][-1]
    last, sequences = (history.environment.get(f"last_{unit}") for unit in ("step", "sequences"))
    if sequences is not None and read >= sequences:  # whose number of updates nobody knew
        return
    if last is not None and step < last:
        yield f"The run ended at step {step:,} of {last:,}."
    elif last is None and sequences is not None:
        yield f"The run ended after {read:,.0f} of {sequences:,} sequences."


def _tiles(history: RunHistory) -> Iterator[dict[str, Any]]:
    def tile(label: str, value: float, kind: str = "plain", more: str = "") -> dict[str, Any]:
        return {"label": label, "value": json_number(value), "kind": kind, "more": more}

    train, validation = history.train, history.validation
    yield tile("steps", train["step"][-1], "plain", f"{train['sequences'][-1]:,.0f} sequences")
    yield tile("training loss", train["loss"][-1], "plain", "nats, last step")
    if validation["step"].size:
        best = (
            np.nanmin(validation["validation_loss"]) if np.isfinite(validation["validation_loss"]).any() else math.nan
        )
        yield tile("validation loss", validation["validation_loss"][-1], "plain", f"nats; best {best:.4f}")
        yield tile("masked accuracy", validation["validation_accuracy"][-1], "percent", "validation")
        yield tile("unigram entropy", history.unigram_entropy, "plain", "nats, without context")
    for name, label, kind, more in (
        ("sequences_per_second", "throughput", "short", "sequences/s, median"),
        ("tokens_per_second", "tokens", "short", "tokens/s, median"),
        ("model_flops_per_second", "model FLOP/s", "short", "median"),
        ("utilisation", "utilisation", "percent", "of peak, median"),
        ("kept_fraction", "kept in the loss", "percent", "of the masked tokens, median"),
    ):
        if name in train and np.isfinite(train[name]).any():
            yield tile(label, float(np.nanmedian(train[name])), kind, more)
    if "seconds" in train:
        total = float(np.nansum(train["seconds"]))
        waited = float(np.nansum(train.get("data_wait_seconds", np.zeros(1))))
        yield tile("training time", total, "minutes", f"{waited / max(total, 1e-9):.1%} waiting for data")


def _train_series(history: RunHistory) -> dict[str, list[float | None]]:
    train = dict(history.train)
    if {"data_wait_seconds", "seconds"} <= set(train):
        train["data_wait_share"] = train["data_wait_seconds"] / np.maximum(train["seconds"], 1e-9)
    if "batch" not in train:  # of an earlier release
        train["batch"] = np.diff(train["sequences"], prepend=np.nan)
        if len(train["batch"]) > 1:
            train["batch"][0] = train["batch"][1]
    pieces = bins(len(train["step"]), _MOST_POINTS)
    reductions = {"step": np.max, "sequences": np.max, "trust_ratio_min": np.min, "trust_ratio_max": np.max}
    series = {name: binned(values, pieces, reductions.get(name, np.mean)) for name, values in train.items()}
    for name in ("host_memory_bytes", "device_peak_memory_bytes"):
        if name in train:
            series[name] = binned(train[name], pieces, np.max)
    if len(pieces) < len(train["step"]):
        series["loss_low"], series["loss_high"] = (binned(train["loss"], pieces, how) for how in (np.min, np.max))
    return {name: _json_list(values) for name, values in series.items()}


def _validation_series(history: RunHistory) -> dict[str, list[float | None]]:
    validation = history.validation
    if not validation["step"].size:
        return {"step": [], "sequences": [], "loss": [], "accuracy": []}
    pieces = bins(len(validation["step"]), _MOST_POINTS)
    sequences = np.interp(validation["step"], history.train["step"], history.train["sequences"])
    return {
        "step": _json_list(binned(validation["step"], pieces, np.max)),
        "sequences": _json_list(binned(sequences, pieces, np.max)),
        "loss": _json_list(binned(validation["validation_loss"], pieces, np.mean)),
        "accuracy": _json_list(binned(validation["validation_accuracy"], pieces, np.mean)),
    }


def _ratio_table(history: RunHistory) -> dict[str, Any] | None:
    """Return what the page's map of layers shows, None without any ratio."""
    pieces = bins(len(history.ratio_steps), _MOST_COLUMNS)
    scale = levels(torch.from_numpy(binned(history.ratios, pieces, np.median).T))
    if scale is None:
        return None
    return {
        "layers": history.layers,
        "names": [short_name(layer) for layer in history.layers],
        "steps": _json_list(binned(history.ratio_steps, pieces, np.max)),
        "measures": [{"title": "trust ratio", **scale}],
    }


def _tables(history: RunHistory) -> list[tuple[str, list[tuple[str, str]]]]:
    sections = {name: fields for name, fields in history.config.items() if isinstance(fields, dict)}
    named = [(name, fields) for name, fields in (*sections.items(), ("environment", history.environment)) if fields]
    return [(name, [(key, _shown(value)) for key, value in fields.items()]) for name, fields in named]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _json_list(values: NDArray[np.float64]) -> list[float | None]:
    return [json_number(value) for value in values.tolist()]


@ends_with_message("report")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    prog = called("report")
    parser = CommandParser(
        prog=prog,
        description="Make the report of a run, finished or not.",
        examples=examples(prog, "runs/lamb-tiny-1", "runs/lamb-tiny-1 --stages"),
    )
    parser.add_argument("folder", type=Path, help="the run's folder, e.g. runs/lamb-tiny-1")
    parser.add_argument("--stages", action="store_true", help="print how long each stage took, as a table, and stop")
    options = parser.parse_args(arguments)
    folder = options.folder
    if options.stages:
        for line in stage_table(folder):
            print(line)
        return 0
    make_report(folder)
    print(folder / REPORT)
    return 0
