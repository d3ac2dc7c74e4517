"""What runs on every rank: the audited training, and what is recorded of it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .collectives import CollectiveCount
from .configurations import Configuration
from .errors import CannotAudit
from .padding import find_shards
from .subject import Subject
from .wrappers import Wrapped, rates, wrap

__all__ = ["OTHER_SEED", "SAVED_AFTER", "SEED", "STEPS", "Recorded", "state_bytes", "train_on_this_rank"]

STEPS = 5
SAVED_AFTER = 3
COUNTED = 1  # the step, from 0, whose collectives are counted: the first one may set up
SEED, OTHER_SEED = 1, 2  # of the weights; what a checkpoint fails to restore must show


Weights = dict[str, list[tuple[int, torch.Tensor]]]
"""What this rank tells of each layer, as (first element, values): of 16-bit models the fp32 weights it steps."""


@dataclass
class Recorded:
    """What one rank saw.

    Attributes:
        weights: After the last step.
        clipping: Norm to which the wrapper clipped the gradient; 0: not.
        rates: Before each step, of each parameter group.
        given_rates: When the optimizer was made.
        has_scheduler: Whether the wrapper drives the learning rates.
        peak_rates: What the wrapper's scheduler goes up to, where it says so.
        collectives: In `optimizer.step` of one step.
        state_bytes: Of the optimizer's state on this rank.
        replaced_by: Name of another optimizer that stepped; None: it was the given one.
        after_silence: Those that began with `OTHER_SEED`, after a first step without gradients; None: not tried.
        padding: Number of elements on this rank that no layer owns; None: not known.
        resumed: Those at the end of a second run that went on from a checkpoint of the first.
        poisoned: The same once more, with NaN in the padding; None: there is none.
        resumed_options: Options of the groups, that differ after that, as (name, first run, second run).
        checkpoint_error: Why there was no second run.
    """

    weights: Weights
    clipping: float
    rates: list[list[float]]
    given_rates: list[float]
    has_scheduler: bool
    peak_rates: list[float] | None
    collectives: int
    state_bytes: int
    replaced_by: str | None
    after_silence: Weights | None = None
    padding: int | None = None
    resumed: Weights | None = None
    poisoned: Weights | None = None
    resumed_options: list[tuple[str, str, str]] = field(default_factory=list)
    checkpoint_error: str | None = None


def train_on_this_rank(
    subject: Subject, configuration: Configuration, folder: str, device: str, checkpoint: bool = True
) -> Recorded | str:
    """Train, save after three steps, go on; then begin anew, without gradients, load, and go on, twice.

    Args:
        subject: What is trained.
        configuration: How.
        folder: An empty one that all ranks see.
        device: Type of the device to train on.
        checkpoint: Whether to make the second run.

    Returns:
        What was recorded, or why the wrapper or the optimizer refused.
    """
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    try:
        with _running(subject, configuration, SEED, where) as run:
            recorded, options = _first_run(run, Path(folder) if checkpoint else None)
        if checkpoint and recorded.checkpoint_error is None:
            with _running(subject, configuration, OTHER_SEED, where) as run:
                _second_run(run, Path(folder), recorded, options)
    except CannotAudit as error:
        return str(error)
    except Exception as error:
        return _reason(error)
    return recorded


@contextmanager
def _running(subject: Subject, configuration: Configuration, seed: int, where: torch.device) -> Iterator[Wrapped]:
    run = wrap(subject, configuration, seed, where)
    try:
        yield run
    finally:
        run.close()


def _first_run(run: Wrapped, folder: Path | None) -> tuple[Recorded, list[dict[str, Any]]]:
    replaced = None if run.optimizer is run.given else type(run.optimizer).__name__
    error, of_steps, count = None, [], CollectiveCount()
    # What a wrapper has allocated and not written may hold anything; whether it is read, the second run shows.
    _fill_padding(run, 0.0)
    for step in range(STEPS):
        run.injection.step = step
        of_steps.append(rates(run.optimizer))
        with _counting(run.optimizer, count, step == COUNTED):
            run.update()
        if step == SAVED_AFTER - 1 and folder is not None:
            error = _try(lambda: run.save(folder))
    peaks = getattr(run.scheduler, "max_lrs", None)
    recorded = Recorded(
        weights=_weights(run),
        clipping=run.clipping,
        rates=of_steps,
        given_rates=run.given_rates,
        has_scheduler=run.scheduler is not None,
        peak_rates=None if peaks is None else [float(peak) for peak in peaks],
        collectives=count.total,
        state_bytes=state_bytes(run.optimizer),
        replaced_by=replaced,
        checkpoint_error=error,
    )
    return recorded, _options(run.optimizer)


def _second_run(run: Wrapped, folder: Path, recorded: Recorded, options: list[dict[str, Any]]) -> None:
    recorded.padding = _fill_padding(run, 0.0)
    run.injection.step, run.injection.silent = 0, True
    run.update()
    recorded.after_silence = _weights(run)
    run.injection.silent = False
    recorded.checkpoint_error = _try(lambda: run.load(folder))
    if recorded.checkpoint_error is not None:
        return
    recorded.resumed = _go_on(run, padding=0.0)
    recorded.resumed_options = _differences(options, _options(run.optimizer))
    if run.sum_over_ranks(recorded.padding or 0):
        run.load(folder)
        recorded.poisoned = _go_on(run, padding=float("nan"))


def _go_on(run: Wrapped, padding: float) -> Weights:
    """The steps after a checkpoint."""
    _fill_padding(run, padding)
    for step in range(SAVED_AFTER, STEPS):
        run.injection.step = step
        run.update()
    return _weights(run)


def _weights(run: Wrapped) -> Weights:
    if run.configuration.dtype != "fp32":
        shards = find_shards(run.optimizer, run.model)
        masters = None if shards is None else shards.values(run.injection.shapes)
        if masters is not None:
            return masters
    # From every rank: each may hold a copy of its own, which only the gradients keep the same.
    return {name: [(0, weights.view(-1))] for name, weights in run.weights().items()}


def _fill_padding(run: Wrapped, value: float) -> int | None:
    shards = find_shards(run.optimizer, run.model)
    return None if shards is None else shards.fill_padding(value)


def _try(action: Any) -> str | None:
    """Do it, and say what it raised."""
    try:
        action()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch.distributed.checkpoint's errors are no Exception
        return _reason(error)
    return None


def _reason(error: BaseException) -> str:
    """The error in one line, with the place that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    lines = str(error).strip().splitlines()
    # Some carry the traceback of another rank, which ends with what it raised.
    text = " ".join((lines[-1] if "Traceback" in str(error) else " ".join(lines)).split())
    return f"{type(error).__name__}: {text or 'no message'} ({Path(frame.filename).name}:{frame.lineno})"


@contextmanager
def _counting(optimizer: torch.optim.Optimizer, count: CollectiveCount, wanted: bool) -> Iterator[None]:
    """Count the collectives of every `step()` call of the optimizer."""
    if not wanted:
        yield
        return
    hooks = (
        optimizer.register_step_pre_hook(lambda *_: count.__enter__() and None),
        optimizer.register_step_post_hook(lambda *_: count.__exit__(None, None, None)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# What is recorded ---------------------------------------------------------------------------------------------------


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the optimizer's state here."""
    return sum(map(_bytes, optimizer.state.values()))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        here = getattr(value, "to_local", lambda: value)()
        return int(here.numel() * here.element_size())
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in optimizer.param_groups]


def _differences(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    if len(one) != len(other):
        return [("number of groups", str(len(one)), str(len(other)))]
    found = []
    for before, after in zip(one, other, strict=True):
        for name in before.keys() | after.keys():
            values = _printed(before.get(name, "missing")), _printed(after.get(name, "missing"))
            if values[0] != values[1]:
                found.append((name, *values))
    return sorted(set(found))


def _printed(option: Any) -> str:
    """The option without where in memory it is."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(option))
