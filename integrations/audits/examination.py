"""One audit from beginning to end: alone, on the ranks, and the verdict."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from .configurations import Configuration
from .errors import CannotAudit
from .group_of_one import group_of_one
from .reference import Alone, train_alone
from .subject import Subject
from .training import Recorded, train_on_this_rank
from .verdict import Report, judge, refusal

__all__ = ["Runner", "audited_device", "check_ranks", "examine", "versions"]

PACKAGES = ("torch", "deepspeed", "accelerate", "trustratio")
MOST_RANKS_PER_CORE = 16
NEEDED = {"deepspeed": "deepspeed"}  # by wrapper


class Runner(Protocol):
    """Processes that run a function each."""

    @property
    def world_size(self) -> int:
        """How many."""
        ...

    @property
    def run(self) -> Callable[..., list[Any]]:
        """Call a function on all of them, with arguments; returns what it returned, in the order of ranks."""
        ...


def examine(subject: Subject, configuration: Configuration, ranks: Runner, device: str = "cpu") -> Report:
    """Train alone and on the ranks, and compare.

    Raises:
        CannotAudit: If there can be no verdict for a reason that is the user's to mend, before or while ranks train.
    """
    if ranks.world_size == 1:
        configuration = configuration.noting("one rank shards nothing: what goes wrong shows at 2 or more")
    is_deepspeed = configuration.wrapper == "deepspeed"
    dtype = torch.float32 if is_deepspeed else None
    micro_batches = ranks.world_size * configuration.accumulation

    def alone(clipping: float, rates: Sequence[Sequence[float]] | None = None, chance: int = 0) -> Alone:
        with group_of_one(device):
            return train_alone(
                subject,
                micro_batches,
                clipping,
                dtype,
                torch.device(device),
                rates,
                chance,
                clips_what_is_stepped=configuration.zero_stage > 0,
            )

    first = alone(configuration.clipping or 0.0)
    _refuse_chance(subject, first, alone(configuration.clipping or 0.0, chance=1))
    with tempfile.TemporaryDirectory() as folder:
        answers = ranks.run(train_on_this_rank, subject, configuration, folder, device)
    refused = [answer for answer in answers if isinstance(answer, str)]
    if refused:
        return _dated(refusal(subject, configuration, ranks.world_size, refused[0]))
    recorded: Recorded = answers[0]
    if recorded.has_scheduler or recorded.clipping != (configuration.clipping or 0.0):
        first = alone(recorded.clipping, recorded.rates if recorded.has_scheduler else None)
    return _dated(judge(subject, configuration, first, answers))


def _refuse_chance(subject: Subject, one: Alone, other: Alone) -> None:
    differ = [name for name, weights in one.weights.items() if not _equal(weights, other.weights[name])]
    if differ:
        raise CannotAudit(
            f"{subject.title} is not deterministic: two runs in one process, with the same gradients, end with other "
            f"weights of {differ[0]}, so that a sharded run cannot be compared with it"
        )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _dated(report: Report) -> Report:
    return replace(report, versions=versions())


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# Before anything starts ---------------------------------------------------------------------------------------------


def audited_device(ranks: int) -> str:
    """Say "cuda" where there is a GPU for each rank, and DeepSpeed is not told to leave them alone; else "cpu"."""
    wanted = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return "cuda" if wanted and torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "cpu"


def check_ranks(ranks: int, configuration: Configuration) -> None:
    """Warn of more ranks than cores.

    Raises:
        CannotAudit: If there are none or absurdly many, or the wrapper is not installed.
    """
    cores = os.cpu_count() or 1
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise CannotAudit(f"ranks must be a whole number of at least 1, not {ranks!r}")
    if ranks > MOST_RANKS_PER_CORE * cores:
        raise CannotAudit(
            f"{ranks} ranks on {cores} cores would take all memory and hours: what goes wrong shows at 2 to 4 ranks"
        )
    if ranks > cores:
        warnings.warn(f"{ranks} ranks on {cores} cores take turns, which takes its time", stacklevel=3)
    needed = NEEDED.get(configuration.wrapper)
    for package in filter(None, (needed, "accelerate" if configuration.accelerate else None)):
        if importlib.util.find_spec(package) is None:
            raise CannotAudit(f"{configuration.title} needs {package}, which is not installed: pip install {package}")
