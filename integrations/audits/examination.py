"""One audit from beginning to end: alone, on the ranks, and the verdict."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from trustratio.optimizers.sharding.layout import listing

from .configurations import Configuration
from .errors import CannotAudit, Failure
from .group_of_one import group_of_one
from .injection import LARGEST_MEAN, largest_mean
from .reference import Alone, train_alone
from .subject import Subject
from .training import CHECKS, FEWEST_STEPS, STEPS, Course, Layers, Recorded, layers_on_this_rank, train_on_this_rank
from .verdict import Report, judge, refusal

__all__ = [
    "STEPS",
    "Runner",
    "audited_device",
    "check_ranks",
    "check_steps",
    "examine",
    "versions",
    "with_few_micro_batches",
]

PACKAGES = ("torch", "deepspeed", "accelerate", "trustratio")
MOST_RANKS_PER_CORE = 16
MOST_MICRO_BATCHES = 16
NEEDED = {"deepspeed": "deepspeed"}  # by wrapper


class Runner(Protocol):
    """Processes that run a function each."""

    @property
    def world_size(self) -> int:
        """How many."""
        ...

    @property
    def run(self) -> Callable[..., list[Any]]:
        """Call a function on all of them, with arguments; returns what it returned, in the order of ranks.

        Where one returns a `Failure`, the others may wait for it in a collective: they are given a few seconds, and
        None stands for the answers that have not come by then.
        """
        ...


def examine(
    subject: Subject, configuration: Configuration, ranks: Runner, device: str = "cpu", steps: int = STEPS
) -> Report:
    """Train alone and on the ranks, and compare after `steps`.

    Raises:
        CannotAudit: If there can be no verdict for a reason that is the user's to mend, before or while ranks train.
    """
    check_steps(steps)
    if ranks.world_size == 1:
        configuration = configuration.noting("one rank shards nothing: what goes wrong shows at 2 or more")
    configuration = with_few_micro_batches(configuration, ranks.world_size)
    dtype = _dtype_alone(configuration)
    micro_batches = ranks.world_size * configuration.accumulation

    def alone(
        course: Course, clipping: float, scheduled: Sequence[Sequence[Mapping[str, Any]]] | None = None, chance: int = 0
    ) -> Alone:
        with group_of_one(device):
            return train_alone(
                subject,
                course,
                micro_batches,
                clipping,
                dtype,
                torch.device(device),
                scheduled,
                chance,
                clips_what_is_stepped=configuration.clips_what_is_stepped,
            )

    course, clipping = Course(steps), configuration.clipping or 0.0
    try:
        first = alone(course, clipping)
    except CannotAudit:
        course = replace(course, zeros=False)
        first = alone(course, clipping)
        note = f"no gradients of zeros were tried, with which {subject.title} fails in one process already"
        configuration = configuration.noting(note)
    _refuse_chance(subject, first, alone(course, clipping, chance=1))
    _refuse_other_layers(layers_on_this_rank(subject), ranks.run(layers_on_this_rank, subject))
    answers, failed = _on_ranks(ranks, subject, configuration, course, device)
    if not answers:
        return _dated(refusal(subject, configuration, ranks.world_size, *failed.values()))
    recorded = answers[0]
    if recorded.has_scheduler or recorded.clipping != clipping or recorded.early:
        course = replace(course, early=recorded.early)
        first = alone(course, recorded.clipping, recorded.scheduled if recorded.has_scheduler else None)
    return _dated(judge(subject, configuration, first, answers, failed))


def _dtype_alone(configuration: Configuration) -> torch.dtype | None:
    """Of the weights that one process steps: those that the wrapper steps; None: as the user made them."""
    if configuration.wrapper != "deepspeed":
        return None
    return torch.float32 if configuration.keeps_masters else torch.bfloat16


def _on_ranks(
    ranks: Runner, subject: Subject, configuration: Configuration, course: Course, device: str
) -> tuple[list[Recorded], dict[str, str]]:
    """What the ranks recorded, nothing if they cannot train; and why they failed, by what they were at.

    Once a check has failed nothing is left of the run, so that it is made again without that check.
    """
    failed: dict[str, str] = {}
    while True:
        with tempfile.TemporaryDirectory() as folder:
            answers = ranks.run(train_on_this_rank, subject, configuration, course, folder, device)
        failures = {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, Failure)}
        if not failures:
            return answers, failed
        rank, failure = next(iter(failures.items()))
        failed[failure.stage] = failure.reason if len(failures) == len(answers) else f"rank {rank}: {failure.reason}"
        if failure.stage not in course.checks:
            return [], {failure.stage: failed[failure.stage]}
        course = replace(course, checks=CHECKS[: CHECKS.index(failure.stage)])


def with_few_micro_batches(configuration: Configuration, ranks: int) -> Configuration:
    """No more of them than take little time, and than 16 bits can add up without rounding."""
    given = few = configuration.accumulation
    while few > 1 and (few > MOST_MICRO_BATCHES or largest_mean(ranks * few) < LARGEST_MEAN // 6):
        few //= 2
    if few == given:
        return configuration
    note = f"gradient_accumulation_steps is {given}, of which {few} are made: more show nothing else"
    options = {**configuration.options, "gradient_accumulation_steps": few}
    return replace(configuration, options=options, accumulation=few, notes=(*configuration.notes, note))


def _refuse_chance(subject: Subject, one: Alone, other: Alone) -> None:
    differ = [name for name, weights in one.weights.items() if not _equal(weights, other.weights[name])]
    if differ:
        raise CannotAudit(
            f"{subject.title} is not deterministic: two runs in one process, with the same gradients, end with other "
            f"weights of {differ[0]}, so that a sharded run cannot be compared with it"
        )


def _refuse_other_layers(wanted: Layers | None, of_ranks: Sequence[Layers | None]) -> None:
    for rank, layers in enumerate(of_ranks):
        if wanted is None or layers is None or layers == wanted:
            continue
        differing = set(layers) ^ set(wanted)
        what = f"other layers on rank {rank} than in one process ({listing(sorted({name for name, *_ in differing}))})"
        if not differing:
            what = f"its layers in another order on rank {rank} than in one process"
        raise CannotAudit(
            f"the model has {what}: names, order, shapes, dtypes, memory format, buffers and what is frozen or "
            "without_gradient must be the same on every rank, whatever the rank and the number of ranks"
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


def check_steps(steps: int) -> None:
    """Raise CannotAudit unless it is a number of steps that can be compared."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < FEWEST_STEPS:
        raise CannotAudit(f"steps must be a whole number of at least {FEWEST_STEPS}, not {steps!r}")


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
