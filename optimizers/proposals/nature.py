"""What kind of optimizer somebody's class is, found out by trying it on a few small layers; no list has its name.

A step is *element-wise* if an element's change depends on the weight, gradients and state of that element alone: then
it does not matter how layers are cut. No optimizer is whose state is neither a number nor like the layer. A step is
*layer-wise* if it depends on nothing outside the layer. And its direction (change / learning rate) may or may not
depend on the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..options.common import COMMON_DEFAULTS
from ..options.unknown import PASSENGERS
from .trial import FALLING, LARGE_RATE, LAYERS, MATRICES, NO_OPTIONS, RISING, TOLERANCES, Outcome, Trial

__all__ = ["Nature", "kinds_of", "nature_of", "unread_keys"]

HOW_IT_IS_COMPUTED = {"foreach": None, "fused": None, "capturable": False}
"""Options that say how a step is computed, not what: these suit every device."""


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
        hidden: Attributes of the optimizer or of parameters among which must be something that its steps depend on,
            and that is neither in the state nor in the groups; None if there is nothing of that kind.
        puts_others_in_place: Whether it gives the parameters other tensors as their data, where most write into it.
        goes_by_groups: Whether its steps are others if groups are stepped one after the other, as by their number, or
            nobody knows, since it cannot be made with several groups here.
        reads_loss: Whether steps depend on the loss that a closure returns.
        writes_rate: Whether steps change the groups' learning rate.
        failure: What it raised on flat pieces of layers, or on whole ones if that fails too, "" if nothing.
    """

    is_element_wise: bool
    is_layer_wise: bool
    is_random: bool
    is_proportional: bool
    follows_weights: bool = False
    hidden: tuple[str, ...] | None = None
    puts_others_in_place: bool = False
    goes_by_groups: bool = False
    reads_loss: bool = False
    writes_rate: bool = False
    failure: str = ""


def nature_of(
    base_class: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    device: torch.device,
    in_group: Mapping[str, Any] | None = None,
) -> Nature:
    """Find out what kind of optimizer a class is, with these options: a few fresh instances take some steps, once.

    Args:
        base_class: The class.
        options: Of its constructor, without params and lr.
        device: Where it is tried if it does not work on a CPU.
        in_group: All that a group has which it steps, such as keys that are no options of its constructor. Keys that
            its own steps write, as counts, are left out.
    """
    in_group = _without_large({name: value for name, value in (in_group or {}).items() if name not in NO_OPTIONS})
    in_group = {name: value for name, value in in_group.items() if name not in _written(base_class, options, in_group)}
    known = _known.setdefault(base_class, {})
    key = device.type, repr(sorted(options.items())), repr(sorted(_distinguishing(in_group).items()))
    if key not in known:
        how = HOW_IT_IS_COMPUTED
        options = {name: how.get(name, value) for name, value in options.items()}
        in_group = {name: how.get(name, value) for name, value in in_group.items()}
        known[key] = _try(base_class, options, in_group, device)
    return known[key]


_known: WeakKeyDictionary[type, dict[Any, Nature]] = WeakKeyDictionary()
_known_written: WeakKeyDictionary[type, dict[str, set[str]]] = WeakKeyDictionary()


def kinds_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change in options without finding out the nature anew: of numbers, only the sign."""
    return {name: _kind_of(value) for name, value in options.items() if name not in NO_OPTIONS}


def _kind_of(value: Any) -> Any:
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | float):
        return (value > 0) - (value < 0)
    if isinstance(value, list | tuple):
        return [_kind_of(inner) for inner in value]
    if isinstance(value, Mapping):
        return {name: _kind_of(inner) for name, inner in value.items()}
    if isinstance(value, torch.Tensor) and value.is_cpu and value.numel() == 1:  # on a GPU a look would wait
        return _kind_of(value.item())
    return type(value).__name__


def _distinguishing(in_group: Mapping[str, Any]) -> dict[str, Any]:
    """What tells groups apart; not the names and rates that schedulers and wrappers give to each."""
    passengers = {name: type(value).__name__ for name, value in in_group.items() if name in PASSENGERS}
    return {**in_group, **{name: kind for name, kind in passengers.items() if kind != "bool"}}


def unread_keys(
    base_class: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    in_group: Mapping[str, Any],
    keys: Sequence[str],
) -> list[str]:
    """Which of some keys of a group make no difference to the steps of a class, those that switch nothing on aside.

    Args:
        base_class: The class.
        options: Of its constructor, without params and lr.
        in_group: All that the group has.
        keys: Some of it.
    """
    asked = [key for key in keys if isinstance(in_group[key], torch.Tensor) or in_group[key]]
    if not asked:
        return []
    known = _without_large({key: value for key, value in in_group.items() if key not in NO_OPTIONS})
    plain = {name: HOW_IT_IS_COMPUTED.get(name, value) for name, value in options.items()}
    trial = Trial(base_class, plain, known, torch.device("cpu"), torch.float64, MATRICES)
    with_all, _ = trial.attempt(trial.all)
    if with_all is None:
        return []
    unread = []
    for key in asked:
        without, _ = replace(trial, in_group={k: v for k, v in known.items() if k != key}).attempt(trial.all)
        if without is not None and trial.same(with_all, without):
            unread.append(key)
    return unread


def _without_large(in_group: Mapping[str, Any]) -> dict[str, Any]:
    """Without tensors that belong to layers of a size of their own."""

    def is_small(value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(map(is_small, value.values()))
        if isinstance(value, list | tuple):
            return all(map(is_small, value))
        return not isinstance(value, torch.Tensor) or value.numel() <= 1

    return {name: value for name, value in in_group.items() if is_small(value)}


def _written(
    base_class: type[torch.optim.Optimizer], options: Mapping[str, Any], in_group: Mapping[str, Any]
) -> set[str]:
    """Which keys of a group the class's own steps write, so that they say how many there were, not what is wanted."""
    if in_group.keys() <= options.keys() | COMMON_DEFAULTS.keys():
        return set()
    known = _known_written.setdefault(base_class, {})
    key = repr(sorted(options.items()))
    if key not in known:
        cpu, plain = torch.device("cpu"), {name: HOW_IT_IS_COMPUTED.get(name, value) for name, value in options.items()}
        trials = [Trial(base_class, plain, given, cpu, torch.float32, MATRICES) for given in ({}, in_group)]
        outcomes = [outcome for trial in trials if (outcome := trial.attempt(trial.all)[0]) is not None]
        known[key] = outcomes[0].written if outcomes else set()
    return known[key]


def _try(
    base_class: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    in_group: Mapping[str, Any],
    device: torch.device,
) -> Nature:
    places = dict.fromkeys([torch.device("cpu"), *([] if device.type == "meta" else [device])])
    failure = ""
    for loss, shapes, place, dtype in product((None, FALLING), (LAYERS, MATRICES), places, TOLERANCES):
        trial = Trial(base_class, options, in_group, place, dtype, shapes, loss)
        whole, failure = trial.attempt(trial.all)
        if whole is not None:
            return _nature(trial, whole)
    return Nature(is_element_wise=False, is_layer_wise=False, is_random=False, is_proportional=False, failure=failure)


def _nature(trial: Trial, whole: Outcome) -> Nature:
    if not trial.same(whole, trial.run(trial.all, seed=1)):
        return Nature(
            is_element_wise=False,
            is_layer_wise=True,
            is_random=True,
            is_proportional=False,
            puts_others_in_place=whole.puts_others_in_place,
            writes_rate=whole.writes_rate,
        )
    # Only at other rates, and in other shapes, do the same steps round otherwise.
    rounding = trial.as_exact_as(whole)
    cut, failure = trial.attempt(trial.cut)
    apart, _ = trial.attempt(trial.apart)
    faster, _ = trial.attempt(trial.all, LARGE_RATE)
    handed_over, _ = trial.attempt(trial.all, hand_over=True)
    is_proportional = faster is not None and rounding.same(whole, faster)
    return Nature(
        is_element_wise=whole.is_like_layers and cut is not None and rounding.same_parts(whole, cut),
        is_layer_wise=apart is not None and rounding.same_parts(whole, apart),
        is_random=False,
        is_proportional=is_proportional,
        follows_weights=not is_proportional and rounding.follows_weights(whole, faster),
        hidden=None if handed_over is not None and trial.same(whole, handed_over) else whole.attributes,
        puts_others_in_place=whole.puts_others_in_place,
        goes_by_groups=_goes_by_groups(trial),
        reads_loss=_reads_loss(trial),
        writes_rate=whole.writes_rate,
        failure=failure,
    )


def _goes_by_groups(trial: Trial) -> bool:
    for layers in (trial.with_vector, trial.all):  # some make groups by the number of dimensions, some want matrices
        together, _ = trial.attempt(layers, group_by_group=False)
        one_by_one, _ = trial.attempt(layers, group_by_group=True)
        if together is not None and together.filled_groups > 1:
            return one_by_one is None or not trial.same(together, one_by_one)
    return True


def _reads_loss(trial: Trial) -> bool:
    falling, _ = trial.attempt(trial.all, loss=FALLING)
    rising, _ = trial.attempt(trial.all, loss=RISING)
    return falling is not None and (rising is None or not trial.same(falling, rising))
