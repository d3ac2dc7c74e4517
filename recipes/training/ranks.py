"""Start of the process group, and work that one rank does for the others without leaving them waiting if it fails."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ..common.errors import RecipeError, sentence
from ..common.marks import Share, cores_each
from ..common.slurm import tasks_of_others

T = TypeVar("T")

# The first rank may tokenize for long while the others wait; gloo's own limit is half an hour.
_TIMEOUT = datetime.timedelta(hours=12)
_PATIENCE = 60.0  # seconds of waiting for the others to start, before it is said

_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MOST_PORT = 65_535
_REMEDY = "start with deepspeed, torchrun or accelerate, which set these variables, or unset them for one process"


class LauncherError(RecipeError):
    """The launcher's variables are bad: no rank can tell whether another one speaks of it."""


def rank() -> int:
    """Return this process's number among all, from the launcher's environment; 0 without a launcher."""
    return _variable("RANK", 0)


def local_rank() -> int:
    """Return this process's number on its machine."""
    return _variable("LOCAL_RANK", 0)


def world_size() -> int:
    """Return the number of processes that the launcher starts; 1 without a launcher."""
    return _variable("WORLD_SIZE", 1, least=1)


def ranks_on_machine() -> int:
    """Return the number of processes that the launcher starts on this machine."""
    name = "LOCAL_SIZE" if "LOCAL_SIZE" in os.environ else "LOCAL_WORLD_SIZE"
    return _variable(name, world_size(), least=1)


def _variable(name: str, otherwise: int, least: int = 0) -> int:
    """Return a whole number from the environment.

    Raises:
        LauncherError: it is none, or below `least`.
    """
    text = os.environ.get(name)
    if text is None:
        return otherwise
    if not text.strip().isdecimal() or int(text) < least:
        raise LauncherError(f"the environment has {name}={text!r}: allowed is a whole number from {least}; {_REMEDY}")
    return int(text)


def require_launcher() -> None:
    """Check that the launcher's variables belong together, since ranks that cannot find each other wait for hours.

    Raises:
        LauncherError: one is missing or contradicts another.
    """
    # Each process of mpirun would train the whole run by itself, and so would one of srun that `adopt_slurm` missed.
    if others := tasks_of_others(os.environ):
        raise LauncherError(f"the environment has {others} without WORLD_SIZE; {_REMEDY}")
    if world_size() > 1:
        missing = [name for name in _OF_LAUNCHERS if not os.environ.get(name)]
        if missing:
            raise LauncherError(
                f"the environment has WORLD_SIZE={world_size()} without {', '.join(missing)}; {_REMEDY}"
            )
    if not local_rank() <= rank() < world_size():
        raise LauncherError(
            f"the environment has RANK={rank()}, LOCAL_RANK={local_rank()}, WORLD_SIZE={world_size()}: allowed is "
            f"LOCAL_RANK <= RANK < WORLD_SIZE; {_REMEDY}"
        )
    if local_rank() >= ranks_on_machine():
        raise LauncherError(
            f"the environment has LOCAL_RANK={local_rank()} of {ranks_on_machine()} ranks on this machine; {_REMEDY}"
        )
    if os.environ.get("MASTER_PORT") and not 0 <= _variable("MASTER_PORT", 0) <= _MOST_PORT:
        raise LauncherError(
            f"the environment has MASTER_PORT={os.environ['MASTER_PORT']}: allowed is up to {_MOST_PORT}; {_REMEDY}"
        )


def start() -> None:
    """Join the process group; without a launcher, be the only rank.

    Raises:
        LauncherError: the launcher's variables do not belong together.
    """
    require_launcher()
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ[key] = os.environ.get(key) or value
    if not os.environ.get("MASTER_PORT"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_on_machine()))
    else:
        if get_accelerator().device_name() != "cpu":  # which ranks share
            require_own_device(local_rank(), get_accelerator().device_count())
        get_accelerator().set_device(local_rank())
    with _telling_if_it_waits():
        deepspeed.init_distributed(timeout=_TIMEOUT, verbose=False)


def require_own_device(local_rank: int, devices: int) -> None:
    """Check that this rank sees the device that is its own.

    Raises:
        LauncherError: there are fewer, or another program hid them.
    """
    if local_rank >= devices:
        raise LauncherError(
            f"LOCAL_RANK={local_rank}, but this rank sees {devices} {'GPU' if devices == 1 else 'GPUs'}: start no more "
            "ranks on a machine than it has GPUs; under srun use --gpus-per-node and --gpu-bind=none, not "
            "--gpus-per-task"
        )


@contextlib.contextmanager
def _telling_if_it_waits() -> Iterator[None]:
    """Say whom this rank waits for if its start takes long, on every rank: the first one may be what is missing."""
    others = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    waited = f"rank {rank()} of {world_size()} has waited {_PATIENCE:g} seconds for the others at {others}"
    timer = threading.Timer(_PATIENCE, lambda: print(waited, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def on_each_machine(work: Callable[[], T]) -> T:
    """Run `work` on the first rank of every machine and give its result to the machine's other ranks.

    Args:
        work: returns something small that can be pickled.

    Raises:
        RecipeError: `work` raised one, or a file could not be read or written, on any machine; raised on all ranks.
        RuntimeError: `work` raised something else on another rank.
    """
    outcome = _attempt(work) if local_rank() == 0 else None
    return _settle(outcome, first_here=rank() - local_rank())


def on_first_rank(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and give its result to all; errors as in `on_each_machine`."""
    outcome = _attempt(work) if rank() == 0 else None
    return _settle(outcome, first_here=0)


def collect(value: T) -> list[T]:
    """Return every rank's value, by rank; something small that can be pickled."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share_of_all() -> Share:
    """Return this rank's part of what all ranks read together."""
    return Share(rank(), world_size(), collect, cores_each(ranks_on_machine()))


def share_of_machine() -> Share:
    """Return this rank's part of what the ranks of each machine read together; all machines do so at the same time."""
    here = slice(rank() - local_rank(), rank() - local_rank() + ranks_on_machine())
    return Share(local_rank(), ranks_on_machine(), lambda value: collect(value)[here], cores_each(ranks_on_machine()))


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the element-wise mean of a tensor over all ranks, the same on all of them (collective)."""
    total = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total


def collect_failures(failure: BaseException | None) -> list[str]:
    """Return what went wrong on any rank, the same list on all ranks, which wait for each other here.

    Args:
        failure: this rank's, or None.
    """
    shown = None if failure is None else f"{type(failure).__name__}: {failure}"
    return [f"rank {number}: {text}" for number, text in enumerate(collect(shown)) if text is not None]


def _attempt(work: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "done", work()
    except RecipeError as error:
        return "refused", str(error)
    except OSError as error:
        return "refused", sentence(error)
    except BaseException as error:
        return "failed", error


def _settle(outcome: tuple[str, Any] | None, first_here: int) -> Any:
    # An exception of another rank may not survive pickling; its text does.
    shown = ("failed", repr(outcome[1])) if outcome and outcome[0] == "failed" else outcome
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, shown)
    if outcome is not None and outcome[0] == "failed":
        raise outcome[1]
    for number, other in enumerate(outcomes):
        if other is not None and other[0] == "refused":
            raise RecipeError(other[1])
        if other is not None and other[0] == "failed":
            raise RuntimeError(f"rank {number} failed: {other[1]}")
    return outcomes[first_here][1]
