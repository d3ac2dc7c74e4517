"""The folder of a run: configuration, metrics, report and checkpoints. Nothing in it is overwritten unasked.

config.json             resolved configuration
deepspeed_config.json   what DeepSpeed was given
environment.json        machine, versions, ranks, first and last step; `ended_at` is the checkpoint after which all was
                        done, null until then
metrics.jsonl           one object per line, `kind` "train" or "validation"; appended to by a resumed run. Numbers by
                        layer are lists, in the order of the last line of kind "names" before them
report.html, report.png curves and trust ratios, made anew at the end of every run
trust_ratios.png        layers x steps
model/                  of `bert_trainer.py`: what `from_pretrained` loads
tensorboard/, wandb/    of these loggers, if asked for; wandb_id.txt is the run that a resumed one goes on with
.writing-lock           locked, and names the process, while a run writes into the folder
checkpoints/latest      name of the newest complete checkpoint, for other programs: here, the highest step-N is
checkpoints/step-N/     DeepSpeed's files, engine_state.safetensors for other numbers of ranks, and checkpoint.json,
                        which lists them with their hashes
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..common.errors import RecipeError, sentence
from ..common.files import WRITING, remove_folder, remove_unfinished, require_writable, write_json

RUNS = Path("runs")
"""Where runs without an output folder of their own go, in the current folder."""

CONFIG = "config.json"
DEEPSPEED_CONFIG = "deepspeed_config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
ENDED = "ended_at"  # in it
REPORT = "report.html"
CURVES = "report.png"
RATIOS = "trust_ratios.png"
CHECKPOINTS = "checkpoints"
WANDB_ID = "wandb_id.txt"
MODEL, TENSORBOARD, WANDB = "model", "tensorboard", "wandb"
PATIENCE = 120.0
"""Seconds that `--resume auto` waits for a run that still writes into the folder."""

_LOCK = WRITING + "lock"
_POLL = 0.2  # seconds
_held: dict[Path, IO[str]] = {}  # by folder; the system lets go of them when the process ends, however that happens
# In the order in which they are removed. The configuration comes last: what it lies beside is told for a run.
_OWN_FOLDERS = (CHECKPOINTS, MODEL, TENSORBOARD, WANDB)
_OWN_FILES = (DEEPSPEED_CONFIG, ENVIRONMENT, METRICS, REPORT, CURVES, RATIOS, WANDB_ID, CONFIG)


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
        file.close()
        raise _in_use(folder) from None
    except OSError:
        file.close()
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[folder.resolve()] = file


def wait_until_free(folder: Path, say: Callable[[str], None]) -> None:
    """Wait until no process holds `folder`, for at most `PATIENCE` seconds; whoever then holds it is told by `hold`.

    After its launcher was killed, a run finishes its update and writes a checkpoint before it ends.

    Args:
        folder: of a run; it need not exist.
        say: is told whom it waits for.
    """
    waited = 0.0
    while _is_held(folder) and waited < PATIENCE:
        if not waited:
            say(f"another run ({_holder(folder)}) still writes into {folder}: waiting for at most {PATIENCE:g} seconds")
        time.sleep(_POLL)
        waited += _POLL


def mark_ended(folder: Path, checkpoint: str) -> None:
    """Note in environment.json that nothing is left to do after a checkpoint: the report is drawn."""
    write_json(folder / ENVIRONMENT, {**json.loads((folder / ENVIRONMENT).read_text()), ENDED: checkpoint})


def has_ended(folder: Path) -> bool:
    """Tell whether the last process that wrote the run came to its end; of runs of earlier releases it is not known."""
    try:
        return json.loads((folder / ENVIRONMENT).read_text()).get(ENDED, "") is not None
    except (OSError, ValueError, AttributeError):
        return True


def _is_held(folder: Path) -> bool:
    try:
        # Shared, so that ranks that ask at the same time do not see each other.
        with (folder / _LOCK).open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        pass  # there is no lock yet, or the disk has none
    return False


def _in_use(folder: Path) -> RecipeError:
    return RecipeError(
        f"another run ({_holder(folder)}) is writing into output folder {str(folder)!r}; wait until it has ended "
        "or stop it, or give this run its own --output"
    )


def _holder(folder: Path) -> str:
    try:
        return (folder / _LOCK).read_text(errors="replace").strip() or "another process"
    except OSError:
        return "another process"


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
        RecipeError: another run writes into it, it is not empty, or cannot be written.
    """
    require_writable(folder)
    try:
        # What a process that was killed had begun to write is nobody's.
        occupied = folder.exists() and any(not path.name.startswith(WRITING) for path in folder.iterdir())
    except OSError as error:
        raise RecipeError(f"cannot use output folder {str(folder)!r}: {sentence(error)}") from error
    if occupied and _is_held(folder):
        raise _in_use(folder)
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
        remove_unfinished(folder)
        for name in _OWN_FOLDERS:
            remove_folder(folder / name)
        for name in _OWN_FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RecipeError(f"cannot use output folder {str(folder)!r}: {sentence(error)}") from error
    return folder
