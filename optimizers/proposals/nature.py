"""What kind of optimizer somebody's class is, found out by trying it on two tiny matrices; no list has its name.

A step is *element-wise* if an element's change depends on the weight, gradients and state of that element alone: then
it does not matter how layers are cut. No optimizer is whose state is neither a number nor like the layer. A step is
*layer-wise* if it depends on nothing outside the layer. And its direction (change / learning rate) may or may not
depend on the learning rate.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

__all__ = ["LARGE_RATE", "Nature", "copied", "make_base", "nature_of", "options_of_base", "step_without_hooks"]

LARGE_RATE = float(2**48)
"""A rate at which a direction shows in w - w_after with all its digits, however small it is beside the weight. In fp32
it overflows at directions of 1e24 alone, and has all digits of those down to 1e-14 of the weights."""
TINY_RATE = 1e-12
"""At which weights stay what they are."""

SHAPES = ((130, 129), (3, 7))
"""One is so large that nobody takes it for a vector, or leaves a second moment of it as it is."""
CUT = 7001
"""Where the elements of both matrices are cut in two: in the middle of a row."""
STEPS = 30
"""Some wait for a while before they do what they are for."""
HAND_OVER = 17
"""The step before which another instance takes over; no multiple of the periods in which things are done."""
RATES = (0.1, 0.03, 0.2, 0.05, 0.1, 0.4, 0.02, 0.1, 0.3, 0.07, 0.1, 0.15)
SIZES = (1.0, 0.01, 30.0, 1.0, 0.1, 3.0, 1000.0, 0.3, 1.0, 0.003, 10.0, 1.0)
"""Of the gradients, step by step: limits of a norm hold in some and not in others."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-2}
HOW_IT_IS_COMPUTED = {"foreach": None, "fused": None, "capturable": False}
"""Options that say how a step is computed, not what: these suit every device."""
PARALLEL = 1 - 1e-6
"""A cosine above which a state tensor passes for a copy of the weights, or an average that began at zero."""

Part = tuple[slice, tuple[int, ...]]
"""Elements of the two matrices, laid end to end, and the shape of the parameter that has them."""

_SIZES = [rows * columns for rows, columns in SHAPES]
_MATRICES: list[Part] = [(slice(0, _SIZES[0]), SHAPES[0]), (slice(_SIZES[0], sum(_SIZES)), SHAPES[1])]
_ALL = [_MATRICES]
_APART = [[matrix] for matrix in _MATRICES]
_CUT = [[(slice(0, CUT), (CUT,))], [(slice(CUT, sum(_SIZES)), (sum(_SIZES) - CUT,))]]


@dataclass(frozen=True)
class Nature:
    """What is known of a class with its options.

    Attributes:
        is_element_wise: See above; nothing that fails or draws random numbers is.
        is_layer_wise: See above.
        is_random: Whether it makes different steps of the same gradients.
        is_proportional: Whether neither the direction nor the state depends on the learning rate, so that a direction
            can be had at any rate.
        follows_weights: Whether the state has copies or averages of weights, as its own steps make them.
        hidden: Attributes of the optimizer among which must be something that its steps depend on, and that is neither
            in the state nor in the groups; None if there is nothing of that kind.
        puts_others_in_place: Whether it gives the parameters other tensors as their data, where most write into it.
        failure: What it raised on flat pieces of layers, or on whole ones if that fails too, "" if nothing.
    """

    is_element_wise: bool
    is_layer_wise: bool
    is_random: bool
    is_proportional: bool
    follows_weights: bool = False
    hidden: tuple[str, ...] | None = None
    puts_others_in_place: bool = False
    failure: str = ""


def options_of_base(base_class: type[torch.optim.Optimizer]) -> tuple[list[str], bool]:
    """The names of a class's options, and whether its constructor takes others besides."""
    key: Any = base_class
    return _options_of_base(key)


@functools.cache
def _options_of_base(base_class: type[torch.optim.Optimizer]) -> tuple[list[str], bool]:
    parameters = [*inspect.signature(base_class).parameters.values()][1:]
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [p.name for p in parameters if p.kind not in variadic], any(p.kind is variadic[1] for p in parameters)


def make_base(
    base_class: type[torch.optim.Optimizer], params: Any, lr: Any, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """An instance; with lr None, at the class's default rate."""
    constructor: Callable[..., torch.optim.Optimizer] = base_class
    rate = {} if lr is None else {"lr": lr}
    return constructor(params, **rate, **options)


def copied(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for an instance that must not change anybody's: objects that cannot be copied are shared."""
    return {name: _copied(value) for name, value in options.items()}


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever it may raise, as for process groups
        return value


def step_without_hooks(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    """Take a step that the hooks around every optimizer's step do not see; those around ours do."""
    step: Any = type(optimizer).step
    if "step" in vars(optimizer):  # somebody has put his own there, e.g. what torch.compile has made of it
        vars(optimizer)["step"](*arguments)
    elif getattr(step, "hooked", False):
        step.__wrapped__(optimizer, *arguments)
    else:
        step(optimizer, *arguments)


def nature_of(base_class: type[torch.optim.Optimizer], options: Mapping[str, Any], device: torch.device) -> Nature:
    """Find out what kind of optimizer a class is, with these options: a few fresh instances take some steps, once.

    Args:
        base_class: The class.
        options: Of its constructor, without params and lr.
        device: Where it is tried if it does not work on a CPU.
    """
    known = _known.setdefault(base_class, {})
    key = device.type, repr(sorted(options.items()))
    if key not in known:
        known[key] = _try(base_class, {**options, **_as_it_suits(options)}, device)
    return known[key]


_known: WeakKeyDictionary[type, dict[Any, Nature]] = WeakKeyDictionary()


def _as_it_suits(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in HOW_IT_IS_COMPUTED.items() if name in options}


def _try(base_class: type[torch.optim.Optimizer], options: Mapping[str, Any], device: torch.device) -> Nature:
    places = dict.fromkeys([torch.device("cpu"), *([] if device.type == "meta" else [device])])
    trials = [_Trial(base_class, options, place, dtype) for place in places for dtype in TOLERANCES]
    failure = ""
    for trial in trials:
        whole, failure = trial.attempt(_ALL)  # may fail on this device, or in this dtype
        if whole is not None:
            return _nature(trial, whole)
    return Nature(is_element_wise=False, is_layer_wise=False, is_random=False, is_proportional=False, failure=failure)


def _nature(trial: _Trial, whole: _Outcome) -> Nature:
    is_random = not trial.same(whole, trial.run(_ALL, seed=1))
    cut, failure = trial.attempt(_CUT)
    apart, _ = trial.attempt(_APART)
    faster, _ = trial.attempt(_ALL, LARGE_RATE)
    is_proportional = not is_random and faster is not None and trial.same(whole, faster)
    handed_over, _ = trial.attempt(_ALL, hand_over=True)
    is_complete = is_random or (handed_over is not None and trial.same(whole, handed_over))
    return Nature(
        is_element_wise=not is_random and whole.is_like_layers and cut is not None and trial.same_parts(whole, cut),
        is_layer_wise=is_random or (apart is not None and trial.same_parts(whole, apart)),
        is_random=is_random,
        is_proportional=is_proportional,
        follows_weights=not is_proportional and trial.follows_weights(whole, faster),
        hidden=None if is_complete else whole.attributes,
        puts_others_in_place=whole.puts_others_in_place,
        failure=failure,
    )


@dataclass(frozen=True)
class _Outcome:
    """What some steps have shown.

    Attributes:
        directions: (w - w_after) / rate of each step, over all elements.
        state: All tensors of the state after the last step, in their order.
        in_groups: All numbers in the groups of each instance then, in their order.
        is_like_layers: Whether each of them is a number or has the shape of its parameter.
        puts_others_in_place: Whether parameters have other data than before the steps.
        attributes: What the optimizer has besides what every optimizer has.
    """

    directions: list[torch.Tensor]
    state: list[torch.Tensor]
    in_groups: list[list[torch.Tensor]]
    is_like_layers: bool
    puts_others_in_place: bool
    attributes: tuple[str, ...]


@dataclass(frozen=True)
class _Trial:
    """Steps of fresh instances of a class on one device and in one dtype."""

    base_class: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype

    def attempt(
        self, instances: Sequence[Sequence[Part]], rate: float | None = None, **how: bool
    ) -> tuple[_Outcome | None, str]:
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
    ) -> _Outcome:
        """Take some steps with fresh instances, each over parts of the two matrices.

        Args:
            instances: The parts of each.
            rate: Of all steps; None for `RATES`.
            seed: Of random numbers that the class may draw.
            hand_over: Let other instances, which get groups and state, as from a file, take the steps from the middle
                on.
            at_rest: Have the same weights in every step.
        """
        directions = [torch.zeros(sum(_SIZES), device=self.device, dtype=self.dtype) for _ in range(STEPS)]
        state: list[torch.Tensor] = []
        in_groups: list[list[torch.Tensor]] = []
        is_like_layers, puts_others_in_place = True, False
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(seed)
            for parts in instances:
                parameters = [torch.nn.Parameter(self._numbers(0)[at].view(shape)) for at, shape in parts]
                data = [parameter.detach() for parameter in parameters]
                optimizer = make_base(self.base_class, parameters, RATES[0], copied(self.options))
                for step, direction in enumerate(directions):
                    if hand_over and step == HAND_OVER:
                        optimizer = self._handed_over(optimizer, parameters)
                    weights = self._numbers(0 if at_rest else step)
                    self._take(optimizer, parts, parameters, weights, step, rate or RATES[step % len(RATES)], direction)
                state += [value.detach() for value in _tensors(optimizer.state)]
                in_groups.append([number for group in optimizer.param_groups for number in _numbers_in(group)])
                for parameter, before in zip(parameters, data, strict=True):
                    puts_others_in_place |= parameter.data_ptr() != before.data_ptr()
                    of_layer = _tensors(optimizer.state[parameter])
                    is_like_layers &= all(value.numel() <= 1 or value.shape == parameter.shape for value in of_layer)
        attributes = tuple(name for name in vars(optimizer) if not hasattr(_any_optimizer(), name))
        return _Outcome(directions, state, in_groups, is_like_layers, puts_others_in_place, attributes)

    def _handed_over(
        self, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]
    ) -> torch.optim.Optimizer:
        """Another instance with the groups and the state of this one, and nothing else of it."""
        other = make_base(self.base_class, parameters, RATES[0], copied(self.options))
        other.param_groups, other.state, other.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults
        return other

    def _take(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Sequence[Part],
        parameters: Sequence[torch.nn.Parameter],
        weights: torch.Tensor,
        step: int,
        rate: float,
        direction: torch.Tensor,
    ) -> None:
        """Take one step from weights that do not depend on the steps before."""
        gradient = SIZES[step % len(SIZES)] * self._numbers(100 + step)
        gradient[CUT:] *= 0.1
        for parameter, (at, shape) in zip(parameters, parts, strict=True):
            parameter.data.copy_(weights[at].view(shape))
            parameter.grad = gradient[at].view(shape).clone()
        for group in optimizer.param_groups:
            group["lr"] = rate
        step_without_hooks(optimizer)
        for parameter, (at, _) in zip(parameters, parts, strict=True):
            direction[at] = (weights[at] - parameter.detach().reshape(-1)) / rate

    def _numbers(self, seed: int) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        numbers = torch.randn(sum(_SIZES), generator=generator, dtype=torch.float32, device="cpu")
        return numbers.to(self.device, self.dtype)

    def follows_weights(self, whole: _Outcome, faster: _Outcome | None) -> bool:
        """Whether a state tensor is what the weights are while they rest, and another one if they take other steps."""
        resting, _ = self.attempt(_ALL, TINY_RATE, at_rest=True)
        if resting is None or faster is None or not len(resting.state) == len(whole.state) == len(faster.state):
            return False
        weights = [self._numbers(0)[at].view(shape) for at, shape in _MATRICES]
        return any(
            _are_parallel(rests, layer) and not self._near(slow, fast)
            for rests, slow, fast in zip(resting.state, whole.state, faster.state, strict=True)
            for layer in weights
        )

    def same(self, one: _Outcome, other: _Outcome) -> bool:
        """Whether directions and state are the same, but for rounding."""
        return (
            self.same_directions(one, other)
            and len(one.state) == len(other.state)
            and all(map(self._near, one.state, other.state))
        )

    def same_directions(self, one: _Outcome, other: _Outcome) -> bool:
        """Whether the directions are."""
        return all(map(self._near, one.directions, other.directions))

    def same_parts(self, whole: _Outcome, parts: _Outcome) -> bool:
        """Whether the directions are, of one instance and of several that have parts of it, and what groups keep.

        An estimate over the whole model, as D-Adaptation's, may be in a group for long before it shows in a direction.
        """
        (ours,) = whole.in_groups
        return self.same_directions(whole, parts) and all(
            len(ours) == len(theirs) and all(map(self._near, ours, theirs)) for theirs in parts.in_groups
        )

    def _near(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        if one.shape != other.shape:
            return False
        one, other = (tensor.to("cpu", torch.float64) for tensor in (one, other))
        if not one.numel():
            return True
        difference, size = (one - other).abs().max(), one.abs().max()
        return bool(difference <= TOLERANCES[self.dtype] * size)


@functools.cache
def _any_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, device="cpu")], lr=0.1)


def _are_parallel(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool(torch.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0) > PARALLEL)


def _numbers_in(group: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the numbers that a group keeps, options and others, as tensors."""
    for name, value in group.items():
        if isinstance(value, torch.Tensor) and name not in ("lr", "params"):
            yield value.detach()
        elif isinstance(value, int | float) and name != "lr" and math.isfinite(value):
            yield torch.tensor(float(value), dtype=torch.float64)


def _tensors(state: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Yield all tensors of a state, in its order, also those in objects of the optimizer's own."""
    seen = set() if seen is None else seen
    if isinstance(state, torch.Tensor):
        yield state
    elif id(state) not in seen and not isinstance(state, str | type):
        seen.add(id(state))
        inner = state.values() if isinstance(state, Mapping) else state if isinstance(state, Iterable) else ()
        for value in (*inner, *vars(state).values()) if hasattr(state, "__dict__") else inner:
            yield from _tensors(value, seen)
