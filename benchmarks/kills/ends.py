"""Whether a run that was killed and continued came to the end of the undisturbed one, bit for bit, and left nothing."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.kills.runs import LAST, Run
from trustratio.recipes.training.export import trained_weights

_TIMED = {
    *("seconds", "sequences_per_second", "tokens_per_second", "model_flops_per_second", "utilisation"),
    *("data_wait_seconds", "host_memory_bytes", "device_peak_memory_bytes"),
}
_LOCKS = {".lock", ".writing-lock"}  # they stay, locked by nobody


def differences(undisturbed: Run, run: Run) -> list[str]:
    """Return in what the end of a run differs from the undisturbed one's; [] if in nothing."""
    found = []
    for compare in (_of_files, _of_checkpoints, _of_weights, _of_metrics, _of_reports):
        try:
            found += list(compare(undisturbed, run))
        except Exception as error:  # whatever is missing or torn is a difference
            found.append(f"{compare.__name__.removeprefix('_of_')}: {type(error).__name__}: {error}")
    return found


def _of_files(undisturbed: Run, run: Run) -> Iterator[str]:
    """Yield files that only one of them has: temporary ones, partial folders, a missing report."""
    names, expected = _names(run), _names(undisturbed)
    yield from (f"left over: {name}" for name in sorted(names - expected))
    yield from (f"missing: {name}" for name in sorted(expected - names))


def _names(run: Run) -> set[str]:
    """Return the files of output folder and cache; of checkpoints only the last, as others depend on stops between."""
    files = {path.relative_to(run.folder) for part in (run.output, run.cache) for path in part.rglob("*")}
    earlier = re.compile(rf"output/checkpoints/step-(?!{LAST:08d})\d+(/|$)")
    named = {str(path) for path in files if path.name not in _LOCKS}
    return {name for name in named if not earlier.match(name)}


def last_checkpoint(run: Run) -> Path:
    """Return the folder of the checkpoint at the run's end."""
    return run.output / "checkpoints" / f"step-{LAST:08d}"


def _of_checkpoints(undisturbed: Run, run: Run) -> Iterator[str]:
    expected, found = last_checkpoint(undisturbed), last_checkpoint(run)
    for file in sorted(path for path in expected.rglob("*") if path.is_file()):
        name = file.relative_to(expected)
        if file.suffix in (".pt", ".bin", ".safetensors"):
            wrong = first_difference(_content(file), _content(found / name))
            if wrong:
                yield f"checkpoint: {name}: {wrong}"
    if (run.output / "checkpoints" / "latest").read_text().strip() != found.name:
        yield "checkpoint: latest names another one"


def _of_weights(undisturbed: Run, run: Run) -> Iterator[str]:
    """Compare what is exported of the last checkpoint, or what the Trainer's loop leaves as a model."""
    if run.configuration.trainer:
        one, other = (load_file(each.output / "model" / "model.safetensors") for each in (undisturbed, run))
    else:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # DeepSpeed's news
            one, other = (trained_weights(last_checkpoint(each)) for each in (undisturbed, run))
    wrong = first_difference(one, other)
    if wrong:
        yield f"exported model: {wrong}"


def _of_metrics(undisturbed: Run, run: Run) -> Iterator[str]:
    """Compare the lines of metrics.jsonl as they stand: order, steps and values, but for times and memory."""
    lines = [line for each in (undisturbed, run) for line in [_metrics(each)]]
    expected, found = lines
    steps, once = [[(line["kind"], line["step"]) for line in each] for each in lines], "metrics: %s of step %s"
    for (kind, step), count in (Counter(steps[1]) - Counter(steps[0])).items():
        yield f"{once % (kind, step)}: {count} too many"
    for (kind, step), count in (Counter(steps[0]) - Counter(steps[1])).items():
        yield f"{once % (kind, step)}: {count} missing"
    if steps[0] != steps[1]:
        return
    for one, other in zip(expected, found, strict=True):
        # Its norm is measured of the last update before a record is written; a stop on request writes one more.
        for line in (one, other):
            if not {"gradient_norm"} <= (set(one) & set(other)):
                line.pop("gradient_norm", None)
        wrong = first_difference(one, other)
        if wrong:
            yield f"{once % (one['kind'], one['step'])}: {wrong}"
            return


def _metrics(run: Run) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _TIMED} for line in lines]


def _of_reports(undisturbed: Run, run: Run) -> Iterator[str]:
    page = (run.output / "report.html").read_text()
    series = re.search(r'"series":\{.*?"step":\[([\d,]*)\]', page)
    if series is None or series[1] != ",".join(map(str, range(1, LAST + 1))):
        yield f"report: has the steps {series[1] if series else 'of nothing'}"
    for name in ("report.png", "trust_ratios.png"):
        if not (run.output / name).read_bytes().rstrip().endswith(b"IEND\xaeB`\x82"):
            yield f"report: {name} is cut short"


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, weights_only=False, map_location="cpu")


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """Return where two nested values differ in a tensor or number, bit for bit; None if nowhere. Text may differ."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return None if same and torch.equal(_bits(one), _bits(other)) else f"{where or 'value'} differs"
    if isinstance(one, dict):
        if not isinstance(other, dict) or set(map(str, one)) != set(map(str, other)):
            return f"{where or 'value'} has other keys"
        pairs = [(str(key), one[key], other[key]) for key in one]
    elif isinstance(one, list | tuple):
        if not isinstance(other, list | tuple) or len(one) != len(other):
            return f"{where or 'value'} has another length"
        pairs = [(str(place), *values) for place, values in enumerate(zip(one, other, strict=True))]
    else:
        number = isinstance(one, int | float)
        return f"{where or 'value'}: {other!r}, undisturbed {one!r}" if number and repr(one) != repr(other) else None
    found = (first_difference(a, b, f"{where}.{key}".lstrip(".")) for key, a, b in pairs)
    return next((wrong for wrong in found if wrong), None)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
