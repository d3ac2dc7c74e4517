"""What runs on every rank: the audited training, and what is recorded of it."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from trustratio.optimizers.stepping.state import keeps_compensation

from .collectives import CollectiveCount
from .configurations import Configuration
from .errors import CannotAudit, Failure
from .padding import Shards, find_shards
from .subject import Subject
from .wrappers import Wrapped, scheduled, wrap

__all__ = [
    "CHECKPOINT",
    "CHECKS",
    "FEWEST_STEPS",
    "OTHER_SEED",
    "PADDING",
    "SEED",
    "STEPS",
    "Course",
    "Layers",
    "Recorded",
    "layers_on_this_rank",
    "numbers_in_groups",
    "numbers_outside_groups",
    "state_bytes",
    "train_on_this_rank",
]

STEPS = 5
FEWEST_STEPS = 3
COUNTED = 1  # the step, from 0, whose collectives are counted: the first one may set up
SEED, OTHER_SEED = 1, 2  # of the weights; what a checkpoint fails to restore must show
IN_PADDING = (1e4, math.nan)
"""Step by step in turn: who masks NaN reads the number, and who multiplies by zero reads NaN."""

TRAINING, CHECKPOINT, PADDING = "training", "checkpoint", "padding"
CHECKS = (CHECKPOINT, PADDING)  # in the order in which they are made


@dataclass(frozen=True)
class Course:
    """What is trained through, alone and on the ranks.

    Attributes:
        steps: Number of steps that are compared.
        zeros: Whether some of their gradients are zero.
        checks: Those of `CHECKS` to make after them.
        early: Steps with gradients of zeros that come before, in one process, as the wrapper takes them.
    """

    steps: int = STEPS
    zeros: bool = True
    checks: tuple[str, ...] = CHECKS
    early: int = 0

    @property
    def afterwards(self) -> int:
        """Number of the steps that go on from a checkpoint."""
        return max(len(IN_PADDING), self.steps // 2)


Weights = dict[str, list[tuple[int, torch.Tensor]]]
"""What this rank tells of each layer, as (first element, values): of 16-bit models what it steps, fp32 or sums."""


Layers = list[tuple[str, tuple[int, ...], tuple[int, ...], str, str]]
"""Name, shape, strides, dtype and kind of each parameter and buffer, in the model's order."""


@dataclass
class Recorded:
    """What one rank saw.

    Attributes:
        weights: After the last step.
        clipping: Norm to which the wrapper clipped the gradient; 0: not.
        scheduled: Before each step, of each parameter group, what schedulers drive.
        given_rates: When the optimizer was made.
        has_scheduler: Whether the wrapper drives that.
        peak_rates: What the wrapper's scheduler goes up to, where it says so.
        collectives: In `optimizer.step` of one step.
        numbers: What each group keeps besides learning rates, after the last step.
        state_bytes: Of the optimizer's state on this rank.
        early: Steps that the wrapper took before the first one.
        replaced_by: Name of another optimizer that stepped; None: it was the given one.
        after_silence: Those that began with `OTHER_SEED`, after a first step without gradients; None: not tried.
        padding: Number of elements on this rank that no layer owns; None: not known.
        continued: Those after some steps more, which follow the writing of a checkpoint.
        resumed: Those of a new run, which loaded the checkpoint before any step, and went on from it.
        poisoned: The same once more, with `IN_PADDING`; None: there is none.
        saved_options: Options of the groups that writing the checkpoint has changed, as (name, before, after).
        resumed_options: Options of the groups that differ in the end, as (name, first run, second run).
    """

    weights: Weights
    clipping: float
    scheduled: list[list[dict[str, Any]]]
    given_rates: list[float]
    has_scheduler: bool
    peak_rates: list[float] | None
    collectives: int
    numbers: list[dict[str, float]]
    state_bytes: int
    early: int
    replaced_by: str | None
    after_silence: Weights | None = None
    padding: int | None = None
    continued: Weights | None = None
    resumed: Weights | None = None
    poisoned: Weights | None = None
    saved_options: list[tuple[str, str, str]] = field(default_factory=list)
    resumed_options: list[tuple[str, str, str]] = field(default_factory=list)


def train_on_this_rank(
    subject: Subject, configuration: Configuration, course: Course, folder: str, device: str
) -> Recorded | Failure:
    """Train, save, go on; begin anew, for a step without gradients; begin anew as a resumed run does, load, go on.

    Args:
        subject: What is trained.
        configuration: How.
        course: How long, and what is done besides.
        folder: An empty one that all ranks see.
        device: Type of the device to train on.

    Returns:
        What was recorded, or what the wrapper or the optimizer raised, and when.
    """
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    training = _Training(subject, configuration, course, Path(folder), where)
    try:
        return training.whole()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # torch.distributed.checkpoint's errors are no Exception
        return Failure(str(error) if isinstance(error, CannotAudit) else _reason(error), training.stage)


def layers_on_this_rank(subject: Subject) -> Layers | None:
    """Parameters and buffers of the model as it is made here; None: it cannot be."""
    try:
        model, injection = subject.make_model(1, None, SEED)
    except CannotAudit:
        return None  # training says why
    told: list[tuple[str, torch.Tensor, str]] = []
    for name, p in model.named_parameters():
        kind = "frozen" if not p.requires_grad else "idle" if name in injection.without_gradient else "trained"
        told.append((name, p, kind))
    told += [(name, buffer, "buffer") for name, buffer in model.named_buffers()]
    return [(name, tuple(x.shape), x.stride(), str(x.dtype), kind) for name, x, kind in told]


class _Training:
    """All runs of one rank; `stage` says what is being done, should it raise."""

    def __init__(
        self, subject: Subject, configuration: Configuration, course: Course, folder: Path, where: torch.device
    ):
        self.subject, self.configuration, self.course = subject, configuration, course
        self.folder, self.where = folder, where
        self.stage, self.early = TRAINING, 0

    def whole(self) -> Recorded:
        with self._running(SEED) as run:
            recorded, options = self._first_run(run)
        with self._running(OTHER_SEED) as run:
            self._silent_run(run, recorded)
        if CHECKPOINT in self.course.checks:
            # A new one, as after a crash: who sets up in a first step loses there what was loaded.
            with self._running(OTHER_SEED) as run:
                self._resumed_run(run, recorded, options)
        return recorded

    @contextmanager
    def _running(self, seed: int) -> Iterator[Wrapped]:
        stepped: list[torch.optim.Optimizer] = []
        hook = register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(optimizer))
        try:
            run = wrap(self.subject, self.configuration, seed, self.where)
        finally:
            hook.remove()
        self.early = sum(optimizer is run.optimizer for optimizer in stepped)
        run.injection.zeros = self.course.zeros
        try:
            yield run
        finally:
            run.close()

    def _first_run(self, run: Wrapped) -> tuple[Recorded, list[dict[str, Any]]]:
        replaced = None if run.optimizer is run.given else type(run.optimizer).__name__
        of_steps, count = [], CollectiveCount()
        # What a wrapper has allocated and not written may hold anything; whether it is read, the second run shows.
        shards = find_shards(run.optimizer, run.model)
        _fill_padding(shards, 0.0)
        for step in range(self.course.steps):
            run.injection.step = step
            of_steps.append(scheduled(run.optimizer))
            with _counting(run.optimizer, count, step == COUNTED):
                run.update()
        peaks = getattr(run.scheduler, "max_lrs", None)
        recorded = Recorded(
            weights=_weights(run, shards),
            clipping=run.clipping,
            scheduled=of_steps,
            given_rates=run.given_rates,
            has_scheduler=run.scheduler is not None,
            peak_rates=None if peaks is None else [float(peak) for peak in peaks],
            collectives=count.total,
            numbers=numbers_in_groups(run.optimizer),
            state_bytes=state_bytes(run.optimizer),
            early=self.early,
            replaced_by=replaced,
        )
        if CHECKPOINT in self.course.checks:
            self.stage = CHECKPOINT
            options = _options(run.optimizer)
            run.save(self.folder)  # only now, since a wrapper may step the optimizer to save it
            recorded.saved_options = _differences(options, _options(run.optimizer))
            recorded.continued = self._go_on(run, shards, padding=(0.0,))
            self.stage = TRAINING
        return recorded, _options(run.optimizer)

    def _silent_run(self, run: Wrapped, recorded: Recorded) -> None:
        shards = find_shards(run.optimizer, run.model)
        recorded.padding = _fill_padding(shards, 0.0)
        run.injection.step, run.injection.silent = 0, True
        run.update()
        recorded.after_silence = _weights(run, shards)

    def _resumed_run(self, run: Wrapped, recorded: Recorded, options: list[dict[str, Any]]) -> None:
        self.stage = CHECKPOINT
        shards = find_shards(run.optimizer, run.model)
        run.load(self.folder)
        recorded.resumed = self._go_on(run, shards, padding=(0.0,))
        recorded.resumed_options = _differences(options, _options(run.optimizer))
        if PADDING in self.course.checks and run.sum_over_ranks(recorded.padding or 0):
            run.load(self.folder)
            self.stage = PADDING
            recorded.poisoned = self._go_on(run, shards, padding=IN_PADDING)

    def _go_on(self, run: Wrapped, shards: Shards | None, padding: Sequence[float]) -> Weights:
        """The steps after a checkpoint, before each of which the padding is filled with the next of these."""
        for number in range(self.course.afterwards):
            _fill_padding(shards, padding[number % len(padding)])
            run.injection.step = self.course.steps + number
            run.update()
        return _weights(run, shards)


def _weights(run: Wrapped, shards: Shards | None) -> Weights:
    # From every rank: each may hold a copy of its own, which only the gradients keep the same.
    weights = run.weights()
    told = {name: [(0, whole.reshape(-1))] for name, whole in weights.items()}
    groups = run.optimizer.param_groups
    has_sums = any(keeps_compensation(tensor, group) for group in groups for tensor in group["params"])
    if shards is not None and (has_sums or run.configuration.dtype != "fp32"):
        stepped = shards.values(run.optimizer)
        told |= {name: stepped[name] for name, whole in weights.items() if name in stepped and whole.is_contiguous()}
    return told


def _fill_padding(shards: Shards | None, value: float) -> int | None:
    return None if shards is None else shards.fill_padding(value)


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
    step, of_instance = optimizer.step, "step" in vars(optimizer)

    def counted(*given: Any, **options: Any) -> Any:
        with count:
            return step(*given, **options)

    # No hook: an optimizer around another one may have none, as it never called torch's own constructor.
    optimizer.step = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        if of_instance:
            optimizer.step = step  # type: ignore[method-assign]
        else:
            del optimizer.step


# What is recorded ---------------------------------------------------------------------------------------------------


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the optimizer's state here."""
    return sum(map(_bytes, getattr(optimizer, "state", {}).values()))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        here = getattr(value, "to_local", lambda: value)()
        return int(here.numel() * here.element_size())
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def numbers_in_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """The numbers that each group keeps, but for learning rates: options, counts, estimates."""
    return [
        {name: float(value) for name, value in group.items() if _is_number(name, value)}
        for group in optimizer.param_groups
    ]


def numbers_outside_groups(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The numbers that are kept for all groups together: in attributes, and in state under what is no parameter."""
    kept = {name: value for name, value in vars(optimizer).items() if name not in ("param_groups", "defaults")}
    return dict(_numbers_within(kept, ""))


def _numbers_within(kept: dict[Any, Any], path: str) -> Iterator[tuple[str, float]]:
    for key, value in kept.items():
        if not isinstance(key, str):
            continue  # of a parameter, or of an object by its id
        if isinstance(value, torch.optim.Optimizer):
            yield from ((f"{path}{key}.{name}", number) for name, number in numbers_outside_groups(value).items())
        elif isinstance(value, dict):
            yield from _numbers_within(value, f"{path}{key}.")
        elif not isinstance(value, bool) and _is_number(key, value):
            yield f"{path}{key}", float(value)


def _is_number(name: str, value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return name not in ("lr", "params") and value.numel() == 1 and not hasattr(value, "placements")
    return name != "lr" and isinstance(value, int | float)


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
