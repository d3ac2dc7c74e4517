"""A command of recipes/ with a fault inside: `LAUNCHER faulty_command.py ARGUMENTS`; the environment names both.

A fault is what happens, on which rank, at which update: "stop 1 6" stops the second rank's process before update 6.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.faults.sleepy_steps import SleepySteps
from trustratio.optimizers import LAMB
from trustratio.recipes.common.errors import TrainingFailure
from trustratio.recipes.common.progress import PROGRESS
from trustratio.recipes.common.restart_requests import RESTARTS
from trustratio.recipes.data import feed
from trustratio.recipes.training import loop, session, trainer
from trustratio.recipes.training.watchdog import Watchdog

FAULT, SCRIPT, PLACE = "TRUSTRATIO_TEST_FAULT", "TRUSTRATIO_TEST_SCRIPT", "TRUSTRATIO_TEST_PLACE"
FILLER = "filler"
"""A file that takes what a disk has left."""

HANG = 5
"""Seconds without progress that a rank waits after a fault that makes the others wait."""

BODIES = {
    "bert.py": "trustratio.recipes.training.bert",
    "bert_accelerate.py": "trustratio.recipes.training.bert_accelerate",
    "bert_trainer.py": "trustratio.recipes.training.bert_trainer",
}
"""What a command runs."""


def main(arguments: list[str]) -> int:
    """Run the command with the fault that the environment names; return its status."""
    fault = os.environ.get(FAULT, "")
    _remember_watchdogs()
    if fault:
        name, rank, update = fault.split()
        FAULTS[name](int(os.environ["RANK"]) == int(rank), int(update))
    return int(importlib.import_module(BODIES[os.environ[SCRIPT]]).main(arguments))


def forked(log: Path, environment: dict[str, str], arguments: list[str]) -> None:
    """Be a rank: run a command whose output goes to the end of a file, and exit with its status."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.environ.update(environment)
    sys.exit(main(arguments))


def before_update(here: bool, update: int, happens: Callable[[], Any]) -> None:
    """Have something happen on this rank when it begins an update, in either loop; the last asked for comes first."""
    seed_step = loop.seed_step

    def seed(seed: int, step: int, rank: int) -> None:
        if here and step == update - 1:
            happens()
        seed_step(seed, step, rank)

    loop.seed_step = trainer.seed_step = seed


def impatient(seconds: float | None) -> None:
    """Have this rank take so many seconds without progress for a standstill, whatever its configuration says."""
    for watchdog in WATCHDOGS:
        watchdog.hang_seconds = seconds


WATCHDOGS: list[Watchdog] = []


def _remember_watchdogs() -> None:
    enter = Watchdog.__enter__

    def remember(self: Watchdog) -> Watchdog:
        WATCHDOGS.append(self)
        return enter(self)

    Watchdog.__enter__ = remember  # type: ignore[method-assign]


# Standstills ---------------------------------------------------------------------------------------------------------


def _kill(here: bool, update: int) -> None:
    before_update(here, update, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _stop(here: bool, update: int) -> None:
    before_update(here, update, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    before_update(True, update, lambda: impatient(HANG))


def _sleep(here: bool, update: int) -> None:
    before_update(here, update, lambda: time.sleep(10_000))
    before_update(True, update, lambda: impatient(HANG))


def _sleep_in_a_worker(here: bool, update: int) -> None:
    def make(*arguments: Any) -> SleepySteps:
        made = SleepySteps(*arguments)
        made.asleep = update - 1 if here else -1
        return made

    feed._Steps = make  # type: ignore[assignment,misc]
    before_update(True, update - 1, lambda: impatient(HANG))


def _absence(here: bool, update: int) -> None:
    if here:
        time.sleep(10_000)


def _long_preparation(here: bool, update: int) -> None:
    """The first rank prepares for half as many seconds as there are documents."""
    prepare = session.prepare

    def slow(*arguments: Any) -> Any:
        for _ in range(update):
            time.sleep(0.5)
            PROGRESS.move()
        return prepare(*arguments)

    prepare_phase = session._prepare_phase

    def impatiently(*arguments: Any) -> Any:
        impatient(3)
        try:
            return prepare_phase(*arguments)
        finally:
            impatient(None)

    session.prepare, session._prepare_phase = slow, impatiently


# Failures ------------------------------------------------------------------------------------------------------------


def _bug(here: bool, update: int) -> None:
    before_update(here, update, lambda: {}["a bug"])


def _memory(here: bool, update: int) -> None:
    before_update(here, update, lambda: torch.empty(2**60))  # torch's own error, whatever the machine has


def _address_space(here: bool, update: int) -> None:
    """From this update on the system gives this process no more memory than it has."""

    def limit() -> None:
        has = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (has, has))

    before_update(here, update, limit)


def _memory_in_the_optimizer(here: bool, update: int) -> None:
    step, calls = LAMB.step, itertools.count(1)

    def full(self: LAMB, *arguments: Any, **options: Any) -> Any:
        if here and next(calls) == 2 * update:  # ZeRO steps one group of parameters after the other
            raise MemoryError
        return step(self, *arguments, **options)

    LAMB.step = full  # type: ignore[method-assign]


def _memory_at_a_checkpoint(here: bool, update: int) -> None:
    save = torch.save

    def full(state: Any, file: Any, *arguments: Any, **options: Any) -> None:
        if here and f"step-{update:08d}" in str(file):
            raise MemoryError
        save(state, file, *arguments, **options)

    torch.save = full


def _refusal(here: bool, update: int) -> None:
    """What all ranks raise alike, by the rules, on one of them."""

    def refuse() -> None:
        raise TrainingFailure("this rank alone refuses")

    before_update(here, update, refuse)


def _request(here: bool, update: int) -> None:
    """SIGUSR1 reaches this rank while the data are prepared."""
    RESTARTS.listen()
    prepare_phase = session._prepare_phase

    def asked(*arguments: Any) -> Any:
        if here:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(10_000)
        return prepare_phase(*arguments)

    session._prepare_phase = asked


# Places ---------------------------------------------------------------------------------------------------------------


def _place() -> Path:
    """Return what the fault befalls."""
    return Path(os.environ[PLACE])


def _full_disk(here: bool, update: int) -> None:
    before_update(here, update, lambda: fill(_place()))


def fill(folder: Path) -> None:
    """Leave no byte free on the disk of a folder."""
    with contextlib.suppress(OSError), (folder / FILLER).open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def _removal(here: bool, update: int) -> None:
    before_update(here, update, lambda: shutil.rmtree(_place()))


def _renaming(here: bool, update: int) -> None:
    before_update(here, update, lambda: _place().rename(_place().with_name("elsewhere")))


def _immutability(here: bool, update: int) -> None:
    before_update(here, update, lambda: subprocess.run(["chattr", "+i", str(_place())], check=True))


def _replacement(here: bool, update: int) -> None:
    """Put another file of the same size into the place of one."""

    def replace() -> None:
        other = _place().with_name("other")
        other.write_bytes(_place().read_bytes()[::-1])
        os.replace(other, _place())

    before_update(here, update, replace)


# Numbers --------------------------------------------------------------------------------------------------------------


def _overflow(here: bool, update: int) -> None:
    """From this update on, this rank's gradients are beyond what fp16 can hold."""
    from deepspeed import DeepSpeedEngine
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed refuses processors on which it is slow
    backward, begun = DeepSpeedEngine.backward, []

    def overflowing(self: DeepSpeedEngine, loss: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return backward(self, loss * (1e30 if here and begun else 1.0), *arguments, **options)

    DeepSpeedEngine.backward = overflowing
    before_update(here, update, lambda: begun.append(True))


def _clock(here: bool, update: int) -> None:
    """The wall clock of every rank jumps an hour back, and a day forward two updates later."""
    wall, jumps = time.time, [0.0]
    time.time = lambda: wall() + jumps[-1]
    before_update(True, update, lambda: jumps.append(-3600.0))
    before_update(True, update + 2, lambda: jumps.append(86400.0))


FAULTS: dict[str, Callable[[bool, int], None]] = {
    "stop": _stop,
    "kill": _kill,
    "sleep": _sleep,
    "sleep-in-a-worker": _sleep_in_a_worker,
    "absence": _absence,
    "long-preparation": _long_preparation,
    "bug": _bug,
    "memory": _memory,
    "address-space": _address_space,
    "memory-in-the-optimizer": _memory_in_the_optimizer,
    "memory-at-a-checkpoint": _memory_at_a_checkpoint,
    "refusal": _refusal,
    "request": _request,
    "full-disk": _full_disk,
    "removal": _removal,
    "renaming": _renaming,
    "immutability": _immutability,
    "replacement": _replacement,
    "overflow": _overflow,
    "clock": _clock,
}

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
