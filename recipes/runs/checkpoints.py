"""Checkpoints of a run: written completely or not at all, found again, and compared with the run that goes on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError, TrainingFailure
from ..common.files import write_json, write_text
from .folder import CHECKPOINTS, CONFIG, require_in_place

RANKS = "ranks"
"""In a checkpoint's identity: how many wrote it."""

WRITE_ERRORS = (OSError, RuntimeError, MemoryError)
"""What fails where a part of a checkpoint cannot be written; torch.save makes a RuntimeError of a full disk."""

_LEAST_FREE = 2**16  # bytes, of a disk that is not full
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
    latest = path / CHECKPOINTS / _LATEST
    if not latest.is_file():
        raise RecipeError(f"--resume {str(path)!r}: the folder has no complete checkpoint ({latest} is missing)")
    name = latest.read_text(errors="replace").strip()
    newest = path / CHECKPOINTS / name
    if not (name and (newest / _DESCRIPTION).is_file()):
        named = f"names {name!r}, which is missing or incomplete" if name else "is empty"
        raise RecipeError(f"--resume {str(path)!r}: {latest} {named}; give one of the checkpoints beside it")
    return newest


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
    written = sorted(path for path in (folder / CHECKPOINTS).glob("step-*") if _is_complete(path))
    if not written:
        return None, True
    try:
        return find_checkpoint(folder), False
    except RecipeError:  # killed between two renames: what `latest` was to name is there
        whole = [path for path in written if (path / _DESCRIPTION).is_file()]
        if not whole:
            raise
        return whole[-1], False


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
        step = int(values["step"])
        if step < 0 or (_is_complete(checkpoint) and step != int(checkpoint.name.removeprefix("step-"))):
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
            (lambda: self._begin(partial)) if first else None,
            lambda: save(partial),
            (lambda: self._complete(partial, final, step)) if first else None,
        ]
        for part in parts:
            failures = agree(_failure_of(part, self.folder))
            if failures:
                if first:
                    shutil.rmtree(partial, ignore_errors=True)
                raise TrainingFailure(f"the checkpoint of step {step} could not be written ({'; '.join(failures)})")
        return final

    def _begin(self, partial: Path) -> None:
        require_in_place(self.folder.parent)
        _empty_folder(partial)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint."""
        try:
            return find_checkpoint(self.folder.parent)
        except RecipeError:
            return None

    def _complete(self, partial: Path, final: Path, step: int) -> None:
        files = {str(p.relative_to(partial)): _mark(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        write_json(partial / _DESCRIPTION, {"step": step, "identity": self.identity, _FILES: files})
        shutil.rmtree(final, ignore_errors=True)  # only a resumed run that computed the same step again
        os.rename(partial, final)
        write_text(self.folder / _LATEST, final.name + "\n")
        self._drop_old(final)

    def _drop_old(self, newest: Path) -> None:
        complete = sorted(p for p in self.folder.iterdir() if _is_complete(p) and p != newest)
        for old in complete[: max(0, len(complete) - self.keep + 1)]:
            shutil.rmtree(old)


def _mark(file: Path) -> str:
    """Return the length of a file and a hash of its end."""
    size = file.stat().st_size
    with file.open("rb") as content:
        content.seek(max(0, size - _MARKED))
        return f"{size} {hashlib.sha256(content.read()).hexdigest()}"


def _empty_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _failure_of(work: Callable[[], None] | None, folder: Path) -> Exception | None:
    """Run `work`, if any, which writes into `folder`; return what a full disk or a full memory makes of it."""
    try:
        if work is not None:
            work()
    except WRITE_ERRORS as error:
        return _full_disk(folder) or error
    return None


def _full_disk(folder: Path) -> OSError | None:
    """Return the error that a full disk is, if it is full: torch.save tells of an unexpected position instead."""
    try:
        full = shutil.disk_usage(folder).free < _LEAST_FREE
    except OSError:
        return None
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) if full else None


def _is_complete(path: Path) -> bool:
    return re.fullmatch(r"step-\d+", path.name) is not None
