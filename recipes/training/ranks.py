"""Start of the process group, and work that one rank does for the others without leaving them waiting if it fails."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ..common.errors import RecipeError, sentence

T = TypeVar("T")

# The first rank may tokenize for long while the others wait; gloo's own limit is half an hour.
_TIMEOUT = datetime.timedelta(hours=12)


def rank() -> int:
    """Return this process's number among all, from the launcher's environment; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes that the launcher starts; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_on_machine() -> int:
    """Return the number of processes that the launcher starts on this machine."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world_size())))


def start() -> None:
    """Join the process group; without a launcher, be the only rank."""
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_on_machine()))
    else:
        get_accelerator().set_device(local_rank())
    deepspeed.init_distributed(timeout=_TIMEOUT, verbose=False)


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
