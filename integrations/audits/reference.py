"""The same training in one process: plain torch, the same micro-batches one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.stepping.state import keeps_compensation, stepped_weights

from .errors import CannotAudit
from .subject import Subject
from .training import OTHER_SEED, SEED, Course, numbers_in_groups, numbers_outside_groups, state_bytes

__all__ = ["Alone", "train_alone"]

BETWEEN_SUMS = 2.0**-16
"""Distance of neighbours among the sums of two bf16 numbers, relative."""


@dataclass
class Alone:
    """What one process does.

    Attributes:
        before: The weights at the beginning, by layer.
        weights: After the last step.
        paths: Of each layer, the sum of the norms of its steps.
        without_gradient: Layers that get none.
        before_silence: The weights of another beginning, `OTHER_SEED`.
        after_silence: Those after a first step in which all gradients are zero.
        numbers: What each group keeps besides learning rates: at the beginning, and after the last step.
        counted: Names of the numbers outside of groups that steps change.
        state_bytes: Of the optimizer's state.
        parameters: Number of trainable elements.
        left_out: Layers that the optimizer was not given.
        has_coarse_state: Whether any state of elements has 16 bits, where two ways to one number may be far apart.
        rounded: Of layers whose 16-bit weights the optimizer itself rounds, so that agreement is no matter of luck: how
            far apart neighbours are that it rounds to, relative.
    """

    before: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    paths: dict[str, float]
    without_gradient: frozenset[str]
    before_silence: dict[str, torch.Tensor]
    after_silence: dict[str, torch.Tensor]
    numbers: tuple[list[dict[str, float]], list[dict[str, float]]]
    counted: list[str]
    state_bytes: int
    parameters: int
    left_out: frozenset[str]
    has_coarse_state: bool = False
    rounded: Mapping[str, float] = field(default_factory=dict)


def train_alone(
    subject: Subject,
    course: Course,
    micro_batches: int,
    clipping: float,
    dtype: torch.dtype | None,
    device: torch.device,
    scheduled: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    chance: int = 0,
    *,
    clips_what_is_stepped: bool = False,
) -> Alone:
    """Train in this process.

    Args:
        subject: What is trained.
        course: How long.
        micro_batches: Of all ranks in one step.
        clipping: Norm to which the whole model's gradient is clipped; 0: not.
        dtype: Of the weights; None: as the user made them.
        device: Where.
        scheduled: Options of each step and each group, from a scheduler; None: the optimizer's own.
        chance: Seed of torch's random numbers, which an optimizer may draw.
        clips_what_is_stepped: Whether the norm for clipping is of the optimizer's parameters alone.

    Raises:
        CannotAudit: If model or optimizer cannot be made, the optimizer cannot step the model at all, or there is
            nothing to compare, as no layer moves or weights become NaN.
    """
    run = _Run(subject, course, micro_batches, clipping, dtype, device, SEED, clips_what_is_stepped)
    torch.manual_seed(chance)
    run.injection.silent = True
    for _ in range(course.early):
        run.step(0, None)
    run.injection.silent = False
    before, paths = run.weights(), dict.fromkeys(run.injection.shapes, 0.0)
    numbers, outside = numbers_in_groups(run.optimizer), numbers_outside_groups(run.optimizer)
    after = before
    for step in range(course.steps):
        previous = after
        run.step(step, None if scheduled is None else scheduled[step])
        after = run.weights()
        for name in paths:
            paths[name] += _distance(after[name], previous[name])
    _refuse_what_says_nothing(subject, after, paths)
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    named = dict(run.model.named_parameters())
    silent = _Run(subject, course, micro_batches, clipping, dtype, device, OTHER_SEED, clips_what_is_stepped)
    silent.injection.silent = True
    before_silence = silent.weights()
    silent.step(0, None if scheduled is None else scheduled[0])
    return Alone(
        before=before,
        weights=after,
        paths=paths,
        without_gradient=frozenset(run.injection.without_gradient),
        before_silence=before_silence,
        after_silence=silent.weights(),
        numbers=(numbers, numbers_in_groups(run.optimizer)),
        counted=sorted(n for n, x in numbers_outside_groups(run.optimizer).items() if x != outside.get(n)),
        state_bytes=state_bytes(run.optimizer),
        parameters=sum(weights.numel() for weights in before.values()),
        left_out=frozenset(name for name in paths if id(named[name]) not in trained),
        has_coarse_state=_has_coarse_state(run.optimizer),
        rounded=_rounded(run.optimizer, named),
    )


def _rounded(optimizer: torch.optim.Optimizer, named: Mapping[str, torch.Tensor]) -> dict[str, float]:
    if not isinstance(optimizer, LayerwiseOptimizer):
        return {}
    names = {id(p): name for name, p in named.items()}
    return {
        names[id(p)]: BETWEEN_SUMS if keeps_compensation(p, group) else torch.finfo(p.dtype).eps
        for group in optimizer.param_groups
        for p in group["params"]
        if group["master"] is not None and p.dtype == torch.bfloat16
    }


def _has_coarse_state(optimizer: torch.optim.Optimizer) -> bool:
    kept = [value for state in optimizer.state.values() if isinstance(state, dict) for value in state.values()]
    return any(isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16) for value in kept)


def _refuse_what_says_nothing(subject: Subject, after: dict[str, torch.Tensor], paths: dict[str, float]) -> None:
    broken = [name for name, weights in after.items() if not bool(weights.isfinite().all())]
    if broken:
        raise CannotAudit(
            f"with {subject.title} weights become NaN or infinite in one process already, of {broken[0]}: take a "
            "smaller lr"
        )
    if not any(paths.values()):
        raise CannotAudit(
            f"{subject.title} moves no layer in one process, so there is nothing to compare: is its lr 0, or "
            "does it begin later (--steps)?"
        )


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm())


class _Run:
    def __init__(
        self,
        subject: Subject,
        course: Course,
        micro_batches: int,
        clipping: float,
        dtype: torch.dtype | None,
        device: torch.device,
        seed: int,
        clips_what_is_stepped: bool,
    ):
        self.clips_what_is_stepped = clips_what_is_stepped
        self.micro_batches, self.clipping = micro_batches, clipping
        self.model, self.injection = subject.make_model(micro_batches, dtype, seed)
        self.injection.zeros = course.zeros
        self.model.to(device)
        self.optimizer = subject.make_optimizer(self.model)

    def weights(self) -> dict[str, torch.Tensor]:
        named = dict(self.model.named_parameters())
        return {name: stepped_weights(self.optimizer, named[name]).cpu().clone() for name in self.injection.shapes}

    def step(self, step: int, scheduled: Sequence[Mapping[str, Any]] | None) -> None:
        self.injection.step = step
        for group in range(self.micro_batches):
            self.injection.group = group
            (self.model() / self.micro_batches).backward()
        if self.clipping:
            self._clip()
        if scheduled is not None:
            for group_options, of_group in zip(self.optimizer.param_groups, scheduled, strict=True):
                group_options.update(of_group)
        try:
            self.optimizer.step()
        except Exception as error:
            text = " ".join(str(error).split())
            raise CannotAudit(
                f"{type(self.optimizer).__name__} cannot step this model in one process either: "
                f"{type(error).__name__}: {text}"
            ) from error
        self.model.zero_grad()

    def _clip(self) -> None:
        """As DeepSpeed and torch do, but with the norm in fp64."""
        stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
        clipped = stepped if self.clips_what_is_stepped else self.model.parameters()
        gradients = [p.grad for p in clipped if p.grad is not None]
        norm = torch.stack([g.double().norm() for g in gradients]).norm()
        for gradient in gradients:
            # A number, since in bf16 the factor itself would be rounded.
            gradient.mul_(float((self.clipping / (norm + 1e-6)).clamp(max=1.0)))
