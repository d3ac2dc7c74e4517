"""The end of the launcher that started this process, which leaves ranks behind that nobody would stop."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import psutil

_PAUSE = 1.0  # seconds
_SCRIPTS = {"deepspeed", "torchrun", "accelerate", "accelerate-launch"}
_MODULES = ("deepspeed.launcher", "torch.distributed.run", "torch.distributed.launch", "accelerate.commands")


def watch_launcher() -> None:
    """Send this process a SIGTERM once the launcher that started it is gone, or one that started that; in a thread.

    Training answers it by a checkpoint and ends; before and after, the process ends at once. Without a launcher nothing
    is watched: a run in the background may outlive an ordinary shell.
    """
    chain = list(_launchers())
    if chain:
        threading.Thread(target=_watch, args=(chain,), name="launcher watch", daemon=True).start()


def _launchers() -> Iterator[tuple[psutil.Process, int]]:
    """Yield this process and its ancestors below the outermost launcher, each with the id of its parent."""
    try:
        ancestors = [psutil.Process(), *psutil.Process().parents()]
        launchers = [number for number, process in enumerate(ancestors) if number and _is_launcher(process.cmdline())]
        for child, parent in itertools.pairwise(ancestors[: max(launchers, default=0) + 1]):
            yield child, parent.pid
    except psutil.Error:  # it ended meanwhile, or is another user's
        return


def _is_launcher(command: list[str]) -> bool:
    """Tell launchers by their script or module; not by its arguments, which may name anything."""
    options, rest = command[:1], command[1:]
    while rest and rest[0].startswith("-"):  # of Python
        options.append(rest.pop(0))
    called = rest[0] if rest else ""
    if options[-1:] == ["-m"]:
        return called.startswith(_MODULES)
    return bool(_SCRIPTS & {os.path.basename(word) for word in (*command[:1], called)})


def _watch(chain: list[tuple[psutil.Process, int]]) -> None:
    while not (gone := [parent for child, parent in chain if _parent_of(child) != parent]):
        time.sleep(_PAUSE)
    print(f"the launcher, process {gone[0]}, is gone: process {os.getpid()} stops", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _parent_of(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None
