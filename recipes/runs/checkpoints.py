"""Checkpoints of a run: written completely or not at all, found again, and compared with the run that goes on."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError, TrainingFailure
from ..common.files import finish_folder, remove_folder, remove_unfinished, write_json, write_text
from .folder import CHECKPOINTS, CONFIG

RANKS = "ranks"
"""In a checkpoint's identity: how many wrote it."""

_DESCRIPTION = "checkpoint.json"
_LATEST = "latest"
_FILES = "files"  # in it: the mark of every other file of the checkpoint
_MARKED = 2**20  # bytes at a file's end; what torch.save writes ends with the checksums of all its tensors
_PARTIAL = ".partial"  # what the name of a checkpoint's folder ends with until it is whole


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that --resume means: a run's newest one, or the checkpoint given itself.

    Raises:
        RecipeError: there is none.
    """
    if (path / _DESCRIPTION).is_file():
        return path
    if not path.is_dir():
        raise RecipeError(f"--resume {str(path)!r}: no such folder; give a run's folder or one of its checkpoints")
    complete = _complete_ones(path / CHECKPOINTS)
    if not complete:
        raise RecipeError(
            f"--resume {str(path)!r}: the folder has no complete checkpoint (in {path / CHECKPOINTS} no step-N has a "
            f"{_DESCRIPTION})"
        )
    return complete[-1]


def find_or_begin(folder: Path) -> tuple[Path | None, bool]:
    """Return what `--resume auto` means for an output folder.

    Returns:
        The run's newest complete checkpoint, or None if there is no run yet; and whether the folder holds a run that
        ended before its first checkpoint, in the place of which a new one begins.

    Raises:
        RecipeError: there are checkpoints, and none is complete.
    """
    if not (folder / CONFIG).is_file():
        return None, False
    if not any((folder / CHECKPOINTS).glob("step-*[0-9]")):
        return None, True
    return find_checkpoint(folder), False


def run_of(checkpoint: Path) -> Path:
    """Return the run folder that a checkpoint lies in."""
    return checkpoint.resolve().parent.parent


def require_newest(checkpoint: Path, overwrite: bool) -> None:
    """Check that continuing `checkpoint` in its own run folder replaces no later checkpoint.

    Raises:
        RecipeError: the run has later ones and `overwrite` is false.
    """
    later = [path.name for path in _complete_ones(checkpoint.resolve().parent) if path.name > checkpoint.name]
    if later and not overwrite:
        raise RecipeError(
            f"{checkpoint} is followed by {', '.join(later)}, which continuing it would replace; give the "
            "continued run its own --output, or allow it with --overwrite"
        )


def drop_checkpoints_after(run: Path, step: int) -> None:
    """Remove what a run's checkpoint folder has after update `step`, and what a killed process had begun there."""
    folder = run / CHECKPOINTS
    remove_unfinished(folder)
    for path in folder.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(path)
    for path in _complete_ones(folder):
        if _step_of(path) > step:
            remove_folder(path)


def describe_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Return what checkpoint.json says: `step` and `identity`.

    Raises:
        RecipeError: it is unreadable.
    """
    try:
        values = json.loads((checkpoint / _DESCRIPTION).read_text())
        step = int(values["step"])
        if step < 0 or (_has_name(checkpoint) and step != _step_of(checkpoint)):
            raise ValueError(f"step is {step}")
        return {"step": step, "identity": dict(values["identity"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"cannot read {checkpoint / _DESCRIPTION}: {error!r}") from error


def require_whole(checkpoint: Path, is_read: Callable[[str], bool] = lambda name: True) -> None:
    """Check that the files of a checkpoint are those that were written with it.

    Tells files that are missing, were cut short, emptied, or come from another checkpoint, by their length and their
    end. A checkpoint that does not list its files passes.

    Args:
        checkpoint: the folder.
        is_read: whether a file will be read, by its path in the folder; one that will not may be missing.

    Raises:
        RecipeError: lists the files that are not; or one cannot be read.
    """
    try:
        marks = dict(json.loads((checkpoint / _DESCRIPTION).read_text()).get(_FILES, {}))
        missing = [name for name in marks if is_read(name) and not (checkpoint / name).exists()]
        present = [name for name in marks if (checkpoint / name).is_file()]
        others = [name for name in present if _mark(checkpoint / name) != marks[name]]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"cannot read {checkpoint}: {error}") from error
    damage = [f"{', '.join(missing)} is missing"] if missing else []
    damage += [f"{', '.join(others)} was cut short or replaced after the checkpoint was written"] if others else []
    if damage:
        raise RecipeError(
            f"{checkpoint} is damaged: {'; '.join(damage)}; copy the checkpoint's folder anew, or use another "
            "checkpoint of the run"
        )


def check_same_run(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """Check that a checkpoint can continue with what this run would train; the number of ranks is free.

    Raises:
        RecipeError: lists each difference.
    """
    differences = [
        f"  {key}: checkpoint {saved.get(key)!r}, this run {value!r}"
        for key, value in current.items()
        if saved.get(key) != value and key != RANKS
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
        files = {str(p.relative_to(partial)): _mark(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        write_json(partial / _DESCRIPTION, {"step": step, "identity": self.identity, _FILES: files})
        finish_folder(partial, final)
        write_text(self.folder / _LATEST, final.name + "\n")
        self._drop_old(final)

    def _drop_old(self, newest: Path) -> None:
        others = [path for path in _complete_ones(self.folder) if path != newest]
        for old in others[: max(0, len(others) - self.keep + 1)]:
            remove_folder(old)


def _mark(file: Path) -> str:
    """Return the length of a file and a hash of its end."""
    size = file.stat().st_size
    with file.open("rb") as content:
        content.seek(max(0, size - _MARKED))
        return f"{size} {hashlib.sha256(content.read()).hexdigest()}"


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


def _complete_ones(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run's checkpoint folder, the newest last."""
    found = [path for path in folder.glob("step-*") if _has_name(path) and (path / _DESCRIPTION).is_file()]
    return sorted(found, key=_step_of)


def _has_name(path: Path) -> bool:
    return re.fullmatch(r"step-\d+", path.name) is not None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
