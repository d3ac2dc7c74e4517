"""Steps of fresh instances of somebody's optimizer class on small layers of random numbers, and what they show."""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from itertools import accumulate, chain
from typing import Any

import torch

from .instances import copied, make_base, own_of, restore, step_without_hooks
from .rates import set_rate

__all__ = [
    "FALLING",
    "LARGE_RATE",
    "LAYERS",
    "MATRICES",
    "NO_OPTIONS",
    "RISING",
    "TOLERANCES",
    "Outcome",
    "Shapes",
    "Trial",
]

LARGE_RATE = float(2**48)
"""A rate at which a direction shows in w - w_after with all its digits, however small it is beside the weight. In fp32
it overflows at directions of 1e24 alone, and has all digits of those down to 1e-14 of the weights."""
TINY_RATE = 1e-12
"""At which weights stay what they are."""

Shapes = tuple[tuple[int, ...], ...]
MATRICES: Shapes = ((130, 129), (3, 7), (64, 128))
"""One is so large that nobody takes it for a vector, or leaves a second moment of it as it is; one is made of blocks
of any size that people use. Flat pieces of all have odd sizes."""
LAYERS: Shapes = (*MATRICES, (8, 4, 3, 3))
"""With a convolution."""
CUT_AT = 7001
"""Where the elements of all layers are cut in two: in the middle of a row."""
STEPS = 30
"""Some wait for a while before they do what they are for."""
HAND_OVER = 17
"""The step before which another instance takes over; no multiple of the periods in which things are done."""
RATES = (0.1, 0.03, 0.2, 0.05, 0.1, 0.4, 0.02, 0.1, 0.3, 0.07, 0.1, 0.15)
FACTORS = (1.0, 0.9, 0.7, 0.8)
"""By which options and rates of groups differ, if each layer has one."""
SIZES = (1.0, 0.01, 30.0, 1.0, 0.1, 3.0, 1000.0, 0.3, 1.0, 0.003, 10.0, 1.0)
"""Of the gradients, step by step: limits of a norm hold in some and not in others."""
TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-2}
"""Some classes compute in fp32 whatever the parameters are."""
PARALLEL = 1 - 1e-6
"""A cosine above which a state tensor passes for a copy of the weights, or an average that began at zero."""
NO_OPTIONS = ("params", "param_names", "lr")
"""What a group has besides options."""

FALLING: Callable[[int], float] = lambda step: 1.0 / (1 + step)  # noqa: E731
RISING: Callable[[int], float] = lambda step: 5.0 + 3.0 * step  # noqa: E731
"""Losses by the number of the step."""

Part = tuple[slice, tuple[int, ...]]
"""Elements of the layers, laid end to end, and the shape of the parameter that has them."""


@dataclass
class Outcome:
    """What some steps have shown.

    Attributes:
        directions: (w - w_after) / rate of each step, over all elements.
        state: All tensors and numbers of the state after the last step: the model's, and each parameter's.
        of_elements: The same of each element: a tensor like the parameter as it is, a number for all its elements.
        of_groups: All numbers that groups keep then, and those of the whole model in the state.
        filled_groups: How many groups had parameters.
        is_like_layers: Whether state is numbers and tensors of their parameter's shape.
        puts_others_in_place: Whether parameters have other data than before the steps.
        writes_rate: Whether steps have changed a group's rate.
        writes_fp32: Whether all that they have made of the weights are numbers of fp32.
        written: Names of the other keys of groups that steps have changed or added.
        attributes: What optimizer and parameters have as attributes, besides what all have.
    """

    directions: list[torch.Tensor]
    state: list[torch.Tensor] = field(default_factory=list)
    of_elements: list[torch.Tensor] = field(default_factory=list)
    of_groups: list[list[torch.Tensor]] = field(default_factory=list)
    filled_groups: int = 0
    is_like_layers: bool = True
    puts_others_in_place: bool = False
    writes_rate: bool = False
    writes_fp32: bool = True
    written: set[str] = field(default_factory=set)
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """Steps of fresh instances of a class on one device and in one dtype.

    Attributes:
        base_class: The class.
        options: Of its constructor, without params and lr.
        in_group: What each group has besides.
        device: Where the tensors are.
        dtype: Theirs.
        shapes: Of the layers.
        loss: What a closure returns in each step; None for no closure.
        exactness: dtype in whose digits steps are compared; None for `dtype`.
    """

    base_class: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    in_group: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    shapes: Shapes
    loss: Callable[[int], float] | None = None
    exactness: torch.dtype | None = None

    def as_exact_as(self, outcome: Outcome) -> Trial:
        """The same, with comparisons that suit a class which computes in fp32 by itself, if that was one."""
        return replace(self, exactness=torch.float32) if outcome.writes_fp32 else self

    @property
    def layers(self) -> list[Part]:
        """The layers one after the other."""
        ends = [*accumulate(map(math.prod, self.shapes))]
        return [(slice(end - math.prod(shape), end), shape) for end, shape in zip(ends, self.shapes, strict=True)]

    @property
    def size(self) -> int:
        """The number of all elements."""
        return sum(map(math.prod, self.shapes))

    @property
    def all(self) -> list[list[Part]]:
        """One instance that has all layers."""
        return [self.layers]

    @property
    def with_vector(self) -> list[list[Part]]:
        """One instance that has all layers, of which one is a vector."""
        first, (at, shape), *others = self.layers
        return [[first, (at, (math.prod(shape),)), *others]]

    @property
    def apart(self) -> list[list[Part]]:
        """An instance for each layer."""
        return [[layer] for layer in self.layers]

    @property
    def cut(self) -> list[list[Part]]:
        """Two instances with flat pieces of all layers."""
        return [[(slice(0, CUT_AT), (CUT_AT,))], [(slice(CUT_AT, self.size), (self.size - CUT_AT,))]]

    def attempt(
        self, instances: Sequence[Sequence[Part]], rate: float | None = None, **how: Any
    ) -> tuple[Outcome | None, str]:
        """As `run`; or None and what was raised."""
        try:
            return self.run(instances, rate, **how), ""
        except Exception as error:  # whatever it may raise
            return None, f"{type(error).__name__}: {error}"

    def run(
        self,
        instances: Sequence[Sequence[Part]],
        rate: float | None = None,
        seed: int = 0,
        *,
        hand_over: bool = False,
        at_rest: bool = False,
        group_by_group: bool | None = None,
        loss: Callable[[int], float] | None = None,
    ) -> Outcome:
        """Take some steps with fresh instances, each over parts of the layers.

        Args:
            instances: The parts of each.
            rate: Of all steps; None for `RATES`.
            seed: Of random numbers that the class may draw.
            hand_over: Let other instances and parameters, which get groups and state as from a file, go on in the
                middle.
            at_rest: Have the same weights in every step.
            group_by_group: None for one group; else every part is a group with options of its own, and they are
                stepped one after the other, or in one call.
            loss: What a closure returns in each step, in place of the trial's own.
        """
        loss = loss or self.loss
        outcome = Outcome([self._of_all_elements() for _ in range(STEPS)])
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.enable_grad(),
            torch.random.fork_rng(devices),
            warnings.catch_warnings(),
            redirect_stdout(StringIO()),
        ):
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(seed)
            for parts in instances:
                instance = _Instance(self, parts, has_groups=group_by_group is not None)
                for step, direction in enumerate(outcome.directions):
                    if hand_over and step == HAND_OVER:
                        instance.hand_over()
                    weights = self.numbers(0 if at_rest else step)
                    instance.begin(weights, self._gradient(step), rate or RATES[step % len(RATES)])
                    instance.step(loss and loss(step), group_by_group=bool(group_by_group))
                    instance.write_direction(weights, direction)
                instance.add_to(outcome, self._of_all_elements)
        return outcome

    def make(self, parameters: Sequence[torch.nn.Parameter], *, has_groups: bool) -> torch.optim.Optimizer:
        """A fresh instance, whatever its constructor takes: tensors, or groups with keys of their own."""
        special = {name: value for name, value in self.in_group.items() if name not in self.options}
        if has_groups:
            groups = [
                {"params": [p], **_varied({**self.options, **self.in_group}, factor), "lr": RATES[0] * factor}
                for p, factor in zip(parameters, FACTORS, strict=False)
            ]
            plain_groups = [{name: group[name] for name in ("params", "lr")} for group in groups]
            return self._first_made([groups, plain_groups, [*parameters]])
        forms: list[Any] = [[*parameters], [{"params": [*parameters], **special}]]
        optimizer = self._first_made(forms[::-1] if special else forms)
        for group in optimizer.param_groups:
            group.update(copied(self.in_group))
        return optimizer

    def _first_made(self, forms: Sequence[Any]) -> torch.optim.Optimizer:
        errors: list[Exception] = []
        for form in forms:
            try:
                return make_base(self.base_class, form, RATES[0], copied(self.options))
            except Exception as error:  # whatever it may raise
                errors.append(error)
        raise errors[0]

    def _of_all_elements(self) -> torch.Tensor:
        return torch.zeros(self.size, device=self.device, dtype=self.dtype)

    def _gradient(self, step: int) -> torch.Tensor:
        gradient = SIZES[step % len(SIZES)] * self.numbers(100 + step)
        gradient[CUT_AT:] *= 0.1
        return gradient

    def numbers(self, seed: int) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        numbers = torch.randn(self.size, generator=generator, dtype=torch.float32, device="cpu")
        return numbers.to(self.device, self.dtype)

    # Comparisons ----------------------------------------------------------------------------------------------------

    def follows_weights(self, whole: Outcome, faster: Outcome | None) -> bool:
        """Whether a state tensor is what the weights are while they rest, and another one if they take other steps."""
        resting, _ = self.attempt(self.all, TINY_RATE, at_rest=True)
        if resting is None or faster is None or not len(resting.state) == len(whole.state) == len(faster.state):
            return False
        weights = [self.numbers(0)[at].view(shape) for at, shape in self.layers]
        return any(
            _are_parallel(rests, layer) and not self._near(slow, fast)
            for rests, slow, fast in zip(resting.state, whole.state, faster.state, strict=True)
            for layer in weights
        )

    def same(self, one: Outcome, other: Outcome) -> bool:
        """Whether directions and state are the same, but for rounding."""
        return self._all_near(one.directions, other.directions) and self._all_near(one.state, other.state)

    def same_parts(self, whole: Outcome, parts: Outcome) -> bool:
        """Whether directions, state and what groups keep are, of one instance and of several with parts of it.

        An estimate over the whole model, as D-Adaptation's, may be kept for long before it shows in a direction.
        """
        return (
            self._all_near(whole.directions, parts.directions)
            and self._all_near(whole.of_elements, parts.of_elements)
            and all(self._all_near(whole.of_groups[0], theirs) for theirs in parts.of_groups)
        )

    def _all_near(self, ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
        return len(ones) == len(others) and all(map(self._near, ones, others))

    def _near(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        if one.shape != other.shape:
            return False
        one, other = (tensor.to("cpu", torch.float64) for tensor in (one, other))
        if not one.numel():
            return True
        difference, size = (one - other).abs().max(), one.abs().max()
        return bool(difference <= TOLERANCES[self.exactness or self.dtype] * size)


class _Instance:
    """An optimizer over parts of the layers, and its steps."""

    def __init__(self, trial: Trial, parts: Sequence[Part], *, has_groups: bool):
        self.trial, self.parts, self.has_groups = trial, parts, has_groups
        start = trial.numbers(0)
        self.parameters = [torch.nn.Parameter(start[at].view(shape)) for at, shape in parts]
        self.data = [parameter.detach() for parameter in self.parameters]
        self.optimizer = trial.make(self.parameters, has_groups=has_groups)
        self.keys_began = [_leaves_by_key(group) for group in self.optimizer.param_groups]
        self.rates = [0.0 for _ in self.optimizer.param_groups]
        self.writes_rate, self.writes_fp32 = False, True

    def hand_over(self) -> None:
        """Let another instance go on, with groups and state of this one and nothing else of it or its parameters."""
        fresh = [torch.nn.Parameter(parameter.detach().clone()) for parameter in self.parameters]
        of_old = dict(zip(self.parameters, fresh, strict=True))
        other = self.trial.make(fresh, has_groups=self.has_groups)
        for group in self.optimizer.param_groups:
            group["params"] = [of_old[parameter] for parameter in group["params"]]
        for old, new in of_old.items():
            if old in self.optimizer.state:
                self.optimizer.state[new] = self.optimizer.state.pop(old)
        other.param_groups, other.state = self.optimizer.param_groups, self.optimizer.state
        other.defaults = self.optimizer.defaults
        self.optimizer, self.parameters = other, fresh

    def begin(self, weights: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        """Give weights, which do not depend on the steps before, gradients and rates."""
        for parameter, (at, shape) in zip(self.parameters, self.parts, strict=True):
            parameter.data.copy_(weights[at].view(shape))
        self._give(gradient)
        self.gradient = gradient
        factors = FACTORS if self.has_groups else (1.0,) * len(self.rates)
        self.rates = [rate * factor for factor, _ in zip(factors, self.rates, strict=False)]
        for group, rate_of_group in zip(self.optimizer.param_groups, self.rates, strict=True):
            set_rate(group, rate_of_group)

    def step(self, loss: float | None, *, group_by_group: bool) -> None:
        """Take a step, in one call or in one for each group."""

        def evaluate() -> torch.Tensor:
            self._give(self.gradient)
            return torch.tensor(loss, device="cpu")

        groups, state = self.optimizer.param_groups, self.optimizer.state
        began = copied(own_of(state))
        for called in [[group] for group in groups] if group_by_group else [groups]:
            self.optimizer.param_groups = called
            restore(state, began)
            step_without_hooks(self.optimizer, *(() if loss is None else (evaluate,)))
        self.optimizer.param_groups = groups
        self.writes_rate |= any(float(g["lr"]) != _as_kept(g, rate) for g, rate in zip(groups, self.rates, strict=True))

    def _give(self, gradient: torch.Tensor) -> None:
        for parameter, (at, shape) in zip(self.parameters, self.parts, strict=True):
            parameter.grad = gradient[at].view(shape).clone()

    def write_direction(self, weights: torch.Tensor, direction: torch.Tensor) -> None:
        """Write (w - w_after) / rate of the parts."""
        groups = zip(self.optimizer.param_groups, self.rates, strict=True)
        rate_of = {parameter: rate for group, rate in groups for parameter in group["params"]}
        for parameter, (at, _) in zip(self.parameters, self.parts, strict=True):
            after = parameter.detach().reshape(-1)
            direction[at] = (weights[at] - after) / rate_of[parameter]
            self.writes_fp32 &= torch.equal(after.float().to(after.dtype), after)

    def add_to(self, outcome: Outcome, of_all_elements: Callable[[], torch.Tensor]) -> None:
        """Add what the steps of this instance have shown."""
        state = self.optimizer.state
        of_model = [*_leaves(sorted(own_of(state).items(), key=str))]
        outcome.state += [*of_model, *_leaves([state.get(parameter) for parameter in self.parameters])]
        outcome.filled_groups += sum(bool(group["params"]) for group in self.optimizer.param_groups)
        for group, began in zip(self.optimizer.param_groups, self.keys_began, strict=True):
            by_key = _leaves_by_key(group)
            outcome.of_groups.append([*chain.from_iterable(by_key.values()), *of_model])
            outcome.written |= {name for name, leaves in by_key.items() if not _equal(leaves, began.get(name))}
        for parameter, (at, shape) in zip(self.parameters, self.parts, strict=True):
            for index, leaf in enumerate(_leaves(state.get(parameter))):
                outcome.is_like_layers &= leaf.numel() <= 1 or leaf.shape == shape
                if index == len(outcome.of_elements):
                    outcome.of_elements.append(of_all_elements())
                if leaf.numel() == 1 or leaf.shape == shape:
                    outcome.of_elements[index][at] = leaf.reshape(-1).to(outcome.of_elements[index])
        outcome.puts_others_in_place |= any(
            parameter.data_ptr() != data.data_ptr() for parameter, data in zip(self.parameters, self.data, strict=True)
        )
        outcome.writes_rate |= self.writes_rate
        outcome.writes_fp32 &= self.writes_fp32
        outcome.attributes = _attributes(self.optimizer, self.parameters)


def _as_kept(group: Mapping[str, Any], rate: float) -> float:
    """A rate as the group's tensor, if it is one, rounds it."""
    if not isinstance(group["lr"], torch.Tensor):
        return rate
    return float(torch.as_tensor(rate, dtype=group["lr"].dtype, device="cpu"))


def _attributes(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> tuple[str, ...]:
    """What an optimizer and its parameters have as attributes, besides what all have."""
    of_optimizer = [f"self.{name}" for name in vars(optimizer) if not hasattr(_any_optimizer(), name)]
    of_parameters = [f"p.{name}" for parameter in parameters for name in vars(parameter)]
    return tuple(dict.fromkeys([*of_optimizer, *of_parameters]))


@functools.cache
def _any_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, device="cpu")], lr=0.1)


def _are_parallel(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool(torch.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0) > PARALLEL)


def _varied(value: Any, factor: float) -> Any:
    """Options of a group that differ from another's: numbers between 0 and 1, as most may take any of."""
    if isinstance(value, Mapping):
        return {name: _varied(inner, factor) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_varied(inner, factor) for inner in value])
    return value * factor if isinstance(value, float) and 0 < value < 1 else value


def _equal(leaves: Sequence[torch.Tensor], others: Sequence[torch.Tensor] | None) -> bool:
    return others is not None and len(leaves) == len(others) and all(map(torch.equal, leaves, others))


def _leaves_by_key(group: Mapping[str, Any]) -> dict[str, list[torch.Tensor]]:
    return {name: [*_leaves(group[name])] for name in sorted(group, key=str) if name not in NO_OPTIONS}


def _leaves(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Yield copies of all tensors and finite numbers in something, in its order, also of objects of somebody's own."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield value.detach().clone()
    elif isinstance(value, int | float):
        if math.isfinite(value):
            yield torch.tensor(float(value), dtype=torch.float64, device="cpu")
    elif id(value) not in seen and not isinstance(value, str | bytes | type | types.ModuleType):
        seen.add(id(value))
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, Iterable) else ()
        for each in (*inner, *vars(value).values()) if hasattr(value, "__dict__") else inner:
            yield from _leaves(each, seen)
