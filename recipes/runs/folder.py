"""The folder of a run: configuration, metrics, report and checkpoints. Nothing in it is overwritten unasked.

config.json             resolved configuration
deepspeed_config.json   what DeepSpeed was given
environment.json        machine, versions, ranks, first and last step
metrics.jsonl           one object per line, `kind` "train" or "validation"; appended to by a resumed run. Numbers by
                        layer are lists, in the order of the last line of kind "names" before them
report.html, report.png curves and trust ratios, made anew at the end of every run
trust_ratios.png        layers x steps
tensorboard/, wandb/    of these loggers, if asked for; wandb_id.txt is the run that a resumed one goes on with
.writing-lock           locked, and names the process, while a run writes into the folder
checkpoints/latest      name of the newest complete checkpoint
checkpoints/step-N/     DeepSpeed's files, engine_state.safetensors for other numbers of ranks, and checkpoint.json,
                        which lists them
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from pathlib import Path
from typing import IO

from ..common.errors import RecipeError, sentence
from ..common.files import WRITING, require_writable

RUNS = Path("runs")
"""Where runs without an output folder of their own go, in the current folder."""

CONFIG = "config.json"
DEEPSPEED_CONFIG = "deepspeed_config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
REPORT = "report.html"
CURVES = "report.png"
RATIOS = "trust_ratios.png"
CHECKPOINTS = "checkpoints"
WANDB_ID = "wandb_id.txt"
TENSORBOARD, WANDB = "tensorboard", "wandb"
_LOCK = WRITING + "lock"
_held: dict[Path, IO[str]] = {}  # by folder; the system lets go of them when the process ends, however that happens
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


def hold(folder: Path) -> None:
    """Keep other processes from writing a run into `folder` until `let_go`; where disks have no locks, do nothing.

    Raises:
        RecipeError: another process holds it.
    """
    let_go(folder)
    file = (folder / _LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RecipeError(
            f"another run ({holder}) is writing into output folder {str(folder)!r}; wait until it has ended or stop "
            "it, or give this run its own --output"
        ) from None
    except OSError:
        file.close()
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[folder.resolve()] = file


def let_go(folder: Path) -> None:
    """Let other processes write runs into a folder again that `hold` was called for; do nothing if it was not."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        file.close()


def require_in_place(folder: Path) -> None:
    """Check that `folder` is still the one that this process holds; where disks have no locks, that it is there.

    Raises:
        FileNotFoundError: it was removed, renamed or replaced; what is written under its name now would be lost.
    """
    held = _held.get(folder.resolve())
    try:
        now = os.stat(folder if held is None else folder / _LOCK)
        if held is None or os.path.samestat(now, os.fstat(held.fileno())):
            return
    except OSError:
        pass
    raise FileNotFoundError(errno.ENOENT, "the run's folder was removed, renamed or replaced", str(folder))


def require_free(folder: Path) -> None:
    """Check that a new run may use `folder`.

    Raises:
        RecipeError: it is not empty, or cannot be written.
    """
    require_writable(folder)
    try:
        # What a process that was killed had begun to write is nobody's.
        occupied = folder.exists() and any(not path.name.startswith(WRITING) for path in folder.iterdir())
    except OSError as error:
        raise RecipeError(f"cannot use output folder {str(folder)!r}: {sentence(error)}") from error
    if occupied:
        raise RecipeError(
            f"output folder {str(folder)!r} is not empty; choose another --output, continue the run in it with "
            f"--resume {folder}, or replace that run with --overwrite"
        )


def claim_folder(folder: Path, overwrite: bool) -> Path:
    """Create and hold `folder` for a new run; if `overwrite`, clear an earlier run (and nothing else) out of it.

    Raises:
        RecipeError: it is in use, or cannot be created.
    """
    if not overwrite:
        require_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hold(folder)
        for name in _OWN_FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RecipeError(f"cannot use output folder {str(folder)!r}: {sentence(error)}") from error
    for name in _OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    return folder
