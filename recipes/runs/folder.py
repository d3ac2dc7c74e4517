"""The folder of a run: configuration, metrics, report and checkpoints. Nothing in it is overwritten unasked.

config.json             resolved configuration
deepspeed_config.json   what DeepSpeed was given
metrics.jsonl           one object per line, `kind` "train" or "validation"; appended to by a resumed run. Numbers by
                        layer are lists, in the order of the last line of kind "names" before them
report.html, report.png curves and trust ratios, made anew at the end of every run
trust_ratios.png        layers x steps
tensorboard/, wandb/    of these loggers, if asked for
checkpoints/latest      name of the newest complete checkpoint
checkpoints/step-N/     DeepSpeed's files and checkpoint.json
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError, TrainingFailure

CONFIG = "config.json"
DEEPSPEED_CONFIG = "deepspeed_config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
REPORT = "report.html"
CURVES = "report.png"
RATIOS = "trust_ratios.png"
CHECKPOINTS = "checkpoints"
NAMES = "names"
"""Kind of the lines that name the layers of the lines after them."""
_DESCRIPTION = "checkpoint.json"
_LATEST = "latest"
_PARTIAL = ".partial"
WANDB_ID = "wandb_id.txt"
TENSORBOARD, WANDB = "tensorboard", "wandb"
_OWN_FILES = (CONFIG, DEEPSPEED_CONFIG, ENVIRONMENT, METRICS, REPORT, CURVES, RATIOS, WANDB_ID)
_OWN_FOLDERS = (CHECKPOINTS, TENSORBOARD, WANDB)


def fresh_folder(root: Path, name: str) -> Path:
    """Create and return root/name-1, or the first free number after it."""
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = root / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def require_free(folder: Path) -> None:
    """Check that a new run may use `folder`.

    Raises:
        RecipeError: it is not empty, or no folder.
    """
    try:
        occupied = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise RecipeError(f"cannot use output folder {str(folder)!r}: {error.strerror}") from error
    if occupied:
        raise RecipeError(
            f"output folder {str(folder)!r} is not empty; choose another --output, continue the run in it with "
            f"--resume {folder}, or replace that run with --overwrite"
        )


def claim_folder(folder: Path, overwrite: bool) -> Path:
    """Create `folder` for a new run; if `overwrite`, clear an earlier run (and nothing else) out of it.

    Raises:
        RecipeError: it is in use, or cannot be created.
    """
    if not overwrite:
        require_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _OWN_FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RecipeError(f"cannot use output folder {str(folder)!r}: {error.strerror}") from error
    for name in _OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    return folder


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that the file is always either the old or the new one."""
    temporary = path.with_name(path.name + _PARTIAL)
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, path)


class MetricsLog:
    """Appends records to metrics.jsonl, flushed line by line; a log that is not `active` writes nothing."""

    def __init__(self, folder: Path, active: bool) -> None:
        """Open the log of a run folder."""
        self._file = (folder / METRICS).open("a", encoding="utf-8", buffering=1) if active else None
        self._names: dict[str, list[str]] = {}

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; layers' names are written once, not with every record's numbers by layer."""
        if self._file is None:
            return
        names = {key: list(value) for key, value in record.items() if isinstance(value, dict)}
        if any(self._names.get(key) != value for key, value in names.items()):
            self._names.update(names)
            self._line({"kind": NAMES, "step": record["step"], **self._names})
        values = {key: [_rounded(v) for v in record[key].values()] for key in names}
        self._line({**record, **values})

    def _line(self, values: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(values, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")  # more digits are noise, and most of the file


def metric_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics.jsonl as they were written, names apart from numbers."""
    with (folder / METRICS).open(encoding="utf-8") as file:
        for line in file:
            # A run that was killed may have left half a line; the resumed one begins after it.
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if isinstance(values, dict) and "kind" in values and "step" in values:
                yield values


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records in step order; where a resumed run repeated a step, its own record is the one returned."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    names: dict[str, list[str]] = {}
    for line in metric_lines(folder):
        if line["kind"] == NAMES:
            names = line
            continue
        by_layer = {key: dict(zip(names[key], line[key], strict=True)) for key in _lists(line)}
        records[line["kind"], line["step"]] = {**line, **by_layer}
    return sorted(records.values(), key=lambda record: (record["step"], record["kind"]))


def _lists(line: dict[str, Any]) -> list[str]:
    return [key for key, value in line.items() if isinstance(value, list)]


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that --resume means: a run's newest one, or the checkpoint given itself.

    Raises:
        RecipeError: there is none.
    """
    if (path / _DESCRIPTION).is_file():
        return path
    if not path.is_dir():
        raise RecipeError(f"--resume {str(path)!r}: no such folder; give a run's folder or one of its checkpoints")
    latest = path / CHECKPOINTS / _LATEST
    if not latest.is_file():
        raise RecipeError(f"--resume {str(path)!r}: the folder has no complete checkpoint ({latest} is missing)")
    found = path / CHECKPOINTS / latest.read_text().strip()
    if not (found / _DESCRIPTION).is_file():
        raise RecipeError(f"--resume {str(path)!r}: {latest} names {found.name}, which is missing or incomplete")
    return found


def run_of(checkpoint: Path) -> Path:
    """Return the run folder that a checkpoint lies in."""
    return checkpoint.resolve().parent.parent


def require_newest(checkpoint: Path, overwrite: bool) -> None:
    """Check that continuing `checkpoint` in its own run folder replaces no later checkpoint.

    Raises:
        RecipeError: the run has later ones and `overwrite` is false.
    """
    later = [p.name for p in checkpoint.resolve().parent.iterdir() if _is_complete(p) and p.name > checkpoint.name]
    if later and not overwrite:
        raise RecipeError(
            f"{checkpoint} is followed by {', '.join(sorted(later))}, which continuing it would replace; give the "
            "continued run its own --output, or allow it with --overwrite"
        )


def describe_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Return what checkpoint.json says: `step` and `identity`.

    Raises:
        RecipeError: it is unreadable.
    """
    try:
        values = json.loads((checkpoint / _DESCRIPTION).read_text())
        return {"step": int(values["step"]), "identity": dict(values["identity"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"cannot read {checkpoint / _DESCRIPTION}: {error!r}") from error


def check_same_run(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """Check that a checkpoint can continue exactly with what this run would train.

    Raises:
        RecipeError: lists each difference.
    """
    differences = [
        f"  {key}: checkpoint {saved.get(key)!r}, this run {value!r}"
        for key, value in current.items()
        if saved.get(key) != value
    ]
    if differences:
        raise RecipeError(
            f"{checkpoint} is a checkpoint of another model or run and cannot be continued exactly:\n"
            + "\n".join(differences)
        )


class CheckpointFolder:
    """Writes checkpoints under a temporary name and marks them complete by renaming; keeps the newest few."""

    def __init__(self, run: Path, keep: int, identity: dict[str, Any]) -> None:
        """Write to the run's checkpoint folder; `identity` is what a resumed run must agree with."""
        self.folder = run / CHECKPOINTS
        self.keep = keep
        self.identity = identity

    def write(
        self,
        step: int,
        save: Callable[[Path], None],
        agree: Callable[[BaseException | None], list[str]],
        first: bool,
    ) -> Path:
        """Write the checkpoint of `step` (collective over all ranks).

        Args:
            step: updates done.
            save: writes this rank's part into a folder.
            agree: waits for all ranks and returns what went wrong on any of them, given what went wrong on this one.
            first: this is the rank that creates, renames and deletes folders.

        Raises:
            TrainingFailure: a part could not be written, on any rank. What was written is deleted; earlier
                checkpoints are as they were.
        """
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + _PARTIAL)
        parts: list[Callable[[], None] | None] = [
            (lambda: _empty_folder(partial)) if first else None,
            lambda: save(partial),
            (lambda: self._complete(partial, final, step)) if first else None,
        ]
        for part in parts:
            failures = agree(_failure_of(part))
            if failures:
                if first:
                    shutil.rmtree(partial, ignore_errors=True)
                raise TrainingFailure(f"the checkpoint of step {step} could not be written ({'; '.join(failures)})")
        return final

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint."""
        try:
            return find_checkpoint(self.folder.parent)
        except RecipeError:
            return None

    def _complete(self, partial: Path, final: Path, step: int) -> None:
        write_json(partial / _DESCRIPTION, {"step": step, "identity": self.identity})
        shutil.rmtree(final, ignore_errors=True)  # only a resumed run that computed the same step again
        os.rename(partial, final)
        latest = self.folder / (_LATEST + _PARTIAL)
        latest.write_text(final.name + "\n")
        os.replace(latest, self.folder / _LATEST)
        self._drop_old(final)

    def _drop_old(self, newest: Path) -> None:
        complete = sorted(p for p in self.folder.iterdir() if _is_complete(p) and p != newest)
        for old in complete[: max(0, len(complete) - self.keep + 1)]:
            shutil.rmtree(old)


def _empty_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _failure_of(work: Callable[[], None] | None) -> Exception | None:
    """Run `work`, if any; return what a full or broken disk makes of it. torch.save raises RuntimeError then."""
    try:
        if work is not None:
            work()
    except (OSError, RuntimeError) as error:
        return error
    return None


def _is_complete(path: Path) -> bool:
    return re.fullmatch(r"step-\d+", path.name) is not None
