"""Checkpoints of a run: written completely or not at all, found again, and compared with the run that goes on."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError, TrainingFailure, sentence
from ..common.files import finish_folder, read_sealed, remove_folder, remove_unfinished, write_sealed, write_text
from ..common.marks import Share, differing_files, mark_files
from .folder import CHECKPOINTS, CONFIG, require_in_place

RANKS = "ranks"
"""In a checkpoint's identity: how many wrote it."""

STATE_DTYPE = "state_dtype"
"""In a checkpoint's identity: what optimizer state is kept in; None, and missing in earlier releases', is fp32."""

PADDING = "pad_token_id"
"""In a checkpoint's identity: the model's padding, None if it has none; missing in earlier releases', where it is 0."""

ROWS = "vocabulary_rows"
"""In a checkpoint's identity: rows of the embedding table; missing in earlier releases', see `rows_of_checkpoint`."""

_FREE = (RANKS, STATE_DTYPE, PADDING, ROWS)
"""What a continued run may have otherwise."""

WRITE_ERRORS = (OSError, RuntimeError, MemoryError)
"""What fails where a part of a checkpoint cannot be written; torch.save makes a RuntimeError of a full disk."""

_LEAST_FREE = 2**16  # bytes, of a disk that is not full
_DESCRIPTION = "checkpoint.json"
_LATEST = "latest"
_FILES = "files"  # in it: the mark of every other file of the checkpoint
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
        RecipeError: there are checkpoints, and none is complete, or the run's configuration is missing.
    """
    if not (folder / CONFIG).is_file():
        if _complete_ones(folder / CHECKPOINTS):
            raise RecipeError(
                f"--resume auto: {str(folder)!r} has checkpoints, but not the {CONFIG} that their run is continued "
                "with; put it back, or choose another --output"
            )
        return None, False
    if not any((folder / CHECKPOINTS).glob("step-*[0-9]")):
        return None, True
    return find_checkpoint(folder), False


def run_of(checkpoint: Path) -> Path:
    """Return the run folder that a checkpoint lies in; it may lie there as a link to another disk."""
    for path in (Path(os.path.abspath(checkpoint)), checkpoint.resolve()):
        if (path.parents[1] / CONFIG).is_file():
            return path.parents[1].resolve()
    return checkpoint.resolve().parent.parent


def require_newest(checkpoint: Path, overwrite: bool) -> None:
    """Check that continuing `checkpoint` in its own run folder replaces no later checkpoint.

    Raises:
        RecipeError: the run has later ones and `overwrite` is false.
    """
    step = describe_checkpoint(checkpoint)["step"]
    later = [path.name for path in _complete_ones(run_of(checkpoint) / CHECKPOINTS) if _step_of(path) > step]
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
        values = read_sealed(checkpoint / _DESCRIPTION)
        step = int(values["step"])
        if step < 0 or (_has_name(checkpoint) and step != _step_of(checkpoint)):
            raise ValueError(f"step is {step}")
        return {"step": step, "identity": dict(values["identity"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"cannot read {checkpoint / _DESCRIPTION}: {_reason(error)}") from error


def require_whole(
    checkpoint: Path, is_read: Callable[[str], bool] = lambda name: True, share: Share | None = None
) -> None:
    """Check that the files of a checkpoint are those that were written with it, and no others (collective).

    Every byte of them is read before anything is loaded. A checkpoint of an earlier release may list the length and the
    end of its files alone, or not list them: that is then all that is compared.

    Args:
        checkpoint: the folder.
        is_read: whether a file will be read, by its path in the folder; one that will not may be missing.
        share: who reads the files together; None: this process alone.

    Raises:
        RecipeError: lists the files that are not; or one cannot be read. Raised in all who share.
    """
    share = share or Share()
    marks = share.of_first(lambda: _marks_in(checkpoint))
    if marks is None:
        return
    try:
        missing, unknown = share.of_first(lambda: _missing_and_unknown(checkpoint, marks))
        present = {name: mark for name, mark in marks.items() if name not in missing}
        others = differing_files(checkpoint, present, share)
    except OSError as error:
        raise RecipeError(f"cannot read {checkpoint}: {error}") from error
    missing = [name for name in missing if is_read(name)]
    damage = [f"{', '.join(missing)} is missing"] if missing else []
    damage += [f"{', '.join(others)} was changed, cut short or replaced after it was written"] if others else []
    damage += [f"{', '.join(unknown)} was put there later: remove it"] if unknown else []
    if damage:
        raise RecipeError(
            f"{checkpoint} is damaged: {'; '.join(damage)}; copy the checkpoint's folder anew, or use another "
            "checkpoint of the run"
        )


def _marks_in(checkpoint: Path) -> dict[str, str] | None:
    """Return the marks of a checkpoint's files by their path in it; None if it has none."""
    try:
        marks = read_sealed(checkpoint / _DESCRIPTION).get(_FILES)
        return None if marks is None else {str(name): str(mark) for name, mark in marks.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(f"cannot read {checkpoint / _DESCRIPTION}: {_reason(error)}") from error


def _missing_and_unknown(checkpoint: Path, marks: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return which files of a checkpoint are not there, and which are there besides."""
    there = _files_of(checkpoint)
    return [name for name in marks if name not in there], [name for name in there if name not in (*marks, _DESCRIPTION)]


def _files_of(folder: Path) -> list[str]:
    """Return the paths in a folder of all files in it; hidden ones, such as those of network disks, are nobody's."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [str(path) for path in paths if not any(part.startswith(".") for part in path.parts)]


def _reason(error: Exception) -> str:
    return sentence(error) if isinstance(error, OSError) else str(error) or type(error).__name__


def check_same_run(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """Check that a checkpoint can continue with what this run would train.

    The number of ranks is free, and what the optimizer state is kept in.

    Raises:
        RecipeError: lists each difference.
    """
    differences = [
        f"  {key}: checkpoint {saved.get(key)!r}, this run {value!r}"
        for key, value in current.items()
        if saved.get(key) != value and key not in _FREE
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
        share: Share | None = None,
    ) -> Path:
        """Write the checkpoint of `step` (collective over all ranks).

        Args:
            step: updates done.
            save: writes this rank's part into a folder.
            agree: waits for all ranks and returns what went wrong on any of them, given what went wrong on this one.
            first: this is the rank that creates, renames and deletes folders.
            share: how the ranks divide the reading of what they wrote; None: there is one rank.

        Raises:
            TrainingFailure: a part could not be written, on any rank. What was written is deleted; earlier
                checkpoints are as they were.
        """
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + _PARTIAL)
        marks: dict[str, str] = {}
        parts: list[Callable[[], None] | None] = [
            (lambda: self._begin(partial)) if first else None,
            lambda: save(partial),
            lambda: marks.update(_mark_all(partial, share or Share())),
            (lambda: self._complete(partial, final, step, marks)) if first else None,
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

    def _complete(self, partial: Path, final: Path, step: int, marks: dict[str, str]) -> None:
        write_sealed(partial / _DESCRIPTION, {"step": step, "identity": self.identity, _FILES: marks})
        finish_folder(partial, final)
        write_text(self.folder / _LATEST, final.name + "\n")
        self._drop_old(final)

    def _drop_old(self, newest: Path) -> None:
        others = [path for path in _complete_ones(self.folder) if path != newest]
        for old in others[: max(0, len(others) - self.keep + 1)]:
            remove_folder(old)


def _mark_all(folder: Path, share: Share) -> dict[str, str]:
    return mark_files(folder, share.of_first(lambda: _files_of(folder)), share)


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


def _complete_ones(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run's checkpoint folder, the newest last."""
    found = [path for path in folder.glob("step-*") if _has_name(path) and (path / _DESCRIPTION).is_file()]
    return sorted(found, key=_step_of)


def _has_name(path: Path) -> bool:
    return re.fullmatch(r"step-\d+", path.name) is not None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
