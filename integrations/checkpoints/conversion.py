"""The state of other packages' optimizers, as far as it means the same as that of an optimizer here.

    state = torch.load("adamw.pt", weights_only=True)      # of torch.optim.AdamW, apex's FusedLAMB, timm's Lars, ...
    optimizer.load_state_dict(convert_state(optimizer, state))

Names and shapes do not tell what a running sum is of. A state is taken over if what it adds up, as told by its groups'
options, is what the optimizer adds up (`Algorithm.accumulates`); else the difference is named. The layouts were read
from torch 2.13, timm 1.0.31, apex's FusedLAMB and FusedAdam, and DeepSpeed 0.19.8's FusedLamb.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trustratio.optimizers.formulas.chunk_view import COMPENSATION
from trustratio.optimizers.lars import ACCUMULATES
from trustratio.optimizers.layerwise import LayerwiseOptimizer
from trustratio.optimizers.sharding.layout import listing
from trustratio.optimizers.stepping.count import steps_of, whole_steps
from trustratio.optimizers.stepping.foreign_state import stray_state, without_wrappers

from .local_state import unwrapped

__all__ = ["convert_state"]

ADAM = {"amsgrad", "foreach", "capturable"}  # torch's Adam and AdamW
RADAM = {"decoupled_weight_decay", "foreach", "capturable"}  # torch's
LAMB_ALONE = {"grad_averaging", "max_coeff"}  # what LAMBs have beside the options of apex's and DeepSpeed's FusedAdam
TIMM_LARS = {"trust_coeff", "always_adapt", "dampening"}
SGD = {"momentum", "dampening", "nesterov"}  # torch's, and LARS of many packages; these have one of the next besides
LARS_ALONE = {"eps", "eta", "trust_coefficient", "trust_coef", "trust_coeff", "lars_exclude", "lars_adaptation_filter"}
"""Group options that tell who has written a state_dict."""


MEANINGS = {
    "gradient": "AdamW, LAMB",
    "gradient + decay": "Adam with L2, SGD",
    "ratio * (gradient + decay)": "LARC around SGD",
    "lr * ratio * (gradient + decay)": "LARS of the paper",
}
"""What the state of other optimizers adds up, and whose does; the words of `Algorithm.accumulates`."""


@dataclass(frozen=True)
class _Saved:
    """What a foreign state_dict has of one parameter."""

    group: dict[str, Any]
    state: dict[str, Any]


def convert_state(
    optimizer: Any, state_dict: dict[str, Any], *, options: Collection[str] = (), drop: Collection[str] = ()
) -> dict[str, Any]:
    """Make a `state_dict` for an optimizer here from one of another package's, or of another class of this package.

    Parameters are matched by name where both know names, else by position. `step` becomes the layer's own wherever it
    was kept. What a dict does not tell, its groups can be told before: `group["step"]`, the number of updates so far
    (SGD and LARS count none), and `group["accumulates"]`, what its moments or its momentum add up, one of `MEANINGS`.
    apex's FusedLAMB is taken to be made with `adam_w_mode=True`, its default, and SGD not to be inside LARC, which puts
    the ratio into its buffer.

    Args:
        optimizer: Whose `load_state_dict` takes the result, or what wraps it; its parameters must be whole. For a
            wrapper that cuts them, convert in one process and go on with `save_optimizer_state`.
        state_dict: Of an optimizer that keeps `exp_avg` and `exp_avg_sq`, or `momentum_buffer`. It is not changed.
        options: Group options that are taken from it, e.g. ("lr", "weight_decay", "initial_lr"). All others, so by
            default all, stay as they are in `optimizer`.
        drop: State that is left behind, e.g. ("max_exp_avg_sq",) of Adam with amsgrad.

    Returns:
        The dict, which shares tensors with `state_dict`.

    Raises:
        ValueError: Listing what does not mean the same, what is missing, and what would be lost.
        TypeError: If this is not an optimizer of this package, or names are given as one text.
    """
    target = unwrapped(optimizer)
    for name, given in (("options", options), ("drop", drop)):
        if isinstance(given, str):
            raise TypeError(f"{name} must be a collection of names, such as ({given!r},), got {given!r}")
    converted = target.state_dict()
    if not isinstance(state_dict, dict) or not state_dict.keys() >= {"state", "param_groups"}:
        found = f"a dict of {listing([*map(repr, state_dict)])}" if isinstance(state_dict, dict) else type(state_dict)
        raise ValueError(f"expected what an optimizer's state_dict() returns, state and param_groups, got {found}")
    saved = iter(_matched(target, state_dict))
    problems = [*stray_state(state_dict)]
    state: dict[int, dict[str, Any]] = {}
    for index, (group, ours) in enumerate(zip(target.param_groups, converted["param_groups"], strict=True)):
        of_group = {number: next(saved) for number in ours["params"]}
        for number, theirs in of_group.items():
            kept = {what: value for what, value in theirs.state.items() if value is not None and what not in drop}
            if kept.keys() - {"step"}:
                problems += _differences(target, group, theirs.group, kept)
                state[number] = _with_step(kept, theirs.group)
        groups = [theirs.group for theirs in of_group.values()]
        problems += _check_options(group, groups, options)
        ours.update({option: groups[0][option] for option in options if groups and option in groups[0]})
        _warn_of_other_betas(index, group, groups, options)
    if problems:
        raise ValueError(
            f"the state_dict cannot become that of this {type(target).__name__}: {listing([*dict.fromkeys(problems)])}"
        )
    for ours in converted["param_groups"]:
        ours["step"] = steps_of(state)
    return {**converted, "state": state}


def _matched(target: LayerwiseOptimizer, state_dict: dict[str, Any]) -> list[_Saved]:
    """What the dict has of each of the optimizer's parameters, in their order."""
    groups = state_dict["param_groups"]
    saved = [(group, key) for group in groups for key in group["params"]]
    found = [_Saved(group, state_dict["state"].get(key) or {}) for group, key in saved]
    theirs, ours = _names(groups), _names(target.param_groups)
    if theirs and ours:
        by_name = dict(zip(theirs, found, strict=True))
        different = sorted(set(theirs) ^ set(ours))
        if different:
            raise ValueError(f"parameters that only the state_dict or only the optimizer has: {listing(different)}")
        return [by_name[name] for name in ours]
    sizes, wanted = ([len(group["params"]) for group in of] for of in (groups, target.param_groups))
    if sizes != wanted:
        raise ValueError(
            f"the state_dict has groups of {sizes} parameters, the optimizer of {wanted}: make the optimizer with the "
            "same groups, before it is wrapped, or make both from named parameters"
        )
    return found


def _names(groups: list[dict[str, Any]]) -> list[str]:
    """The names of all parameters; none if any has none."""
    names = [name for group in groups for name in group.get("param_names") or group["params"]]
    return [without_wrappers(name) for name in names] if all(isinstance(name, str) for name in names) else []


# Meaning ------------------------------------------------------------------------------------------------------------


def _differences(
    target: LayerwiseOptimizer, group: dict[str, Any], theirs: dict[str, Any], state: dict[str, Any]
) -> Iterator[str]:
    """Why a parameter's state is not what the optimizer keeps."""
    kind = type(target).__name__
    kept = {*target.element_state, *target.layer_state} - {"step"}
    missing, additional = kept - state.keys(), state.keys() - kept - {"step"}
    if group["master"] == "kahan":
        additional -= {COMPENSATION}
    wanted, added = target.accumulates(group), _accumulated(theirs)
    if missing:
        yield f"{kind} keeps {', '.join(sorted(missing))}, which it lacks"
    elif wanted is None:
        yield f"nobody else's state means what that of {kind} does"
    elif added is None:
        yield (
            "it does not tell what its state adds up: set group['accumulates'] in each of its groups to one of "
            + ", ".join(f"{meaning!r} ({whose})" for meaning, whose in MEANINGS.items())
        )
    elif not _same(added, wanted, theirs):
        yield f"its state adds up {added!r}, that of this {kind} {wanted!r}"
    if additional:
        yield f"it has {', '.join(sorted(additional))}, which {kind} does not keep: name it in drop to leave it behind"
    step = state.get("step", theirs.get("step", 0))
    try:
        whole_steps(step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step)
    except ValueError as error:
        yield str(error)
    if "step" not in state and "step" not in theirs:
        yield "it does not count its updates: set group['step'] to their number in each of its groups"
    if bool(theirs.get("maximize")) != bool(group.get("maximize")):
        yield "it was made with another `maximize`, so that its gradients have the other sign"


def _same(added: str, wanted: str, theirs: dict[str, Any]) -> bool:
    """Whether two sums mean the same, with the decay that the state was made with."""
    if not theirs.get("weight_decay"):
        added, wanted = (of.replace("(gradient + decay)", "gradient + decay") for of in (added, wanted))
        added, wanted = (of.replace(" + decay", "") for of in (added, wanted))
    return added == wanted


def _accumulated(group: dict[str, Any]) -> str | None:
    """What the state of a group's parameters adds up, one of `MEANINGS` or like them; None if it does not tell."""
    if "accumulates" in group:
        return str(group["accumulates"])
    return _momentum(group) if "momentum" in group else _moments(group)


def _momentum(group: dict[str, Any]) -> str | None:
    if "momentum_form" in group:
        return ACCUMULATES.get(group["momentum_form"])
    if group.keys() >= TIMM_LARS:
        added = "ratio * (gradient + decay)"
    elif group.keys() >= SGD and not group.keys() & LARS_ALONE:
        added = "gradient + decay"
    else:
        return None
    return f"{1 - group['dampening']} * ({added})" if group["dampening"] else added


def _moments(group: dict[str, Any]) -> str | None:
    of_a_family = "bias_correction" in group or group.keys() >= ADAM or group.keys() >= RADAM
    if "normalize_grad" in group:
        return "gradient / norm" if group["normalize_grad"] else "gradient"
    if not of_a_family or "gsnr_beta" in group:
        return None
    if not group.get("grad_averaging", True):
        return "gradient / (1 - beta1)"
    outside = group.get("decoupled_weight_decay", True if group.keys() & LAMB_ALONE else None)
    if outside is None and group.get("weight_decay"):
        return None  # Adam or AdamW
    return "gradient" if outside else "gradient + decay"


def _with_step(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """The state with the layer's own count of updates, as it is kept here."""
    step = state.get("step", group.get("step", 0.0))
    if not isinstance(step, torch.Tensor):
        step = torch.tensor(step, device="cpu")
    return {**state, "step": step.detach().to(torch.float32, copy=True).reshape(())}


# Options ------------------------------------------------------------------------------------------------------------


def _check_options(group: dict[str, Any], theirs: list[dict[str, Any]], options: Collection[str]) -> Iterator[str]:
    """Options that cannot be taken over into a group."""
    for option in options:
        if any(option not in other for other in theirs):
            yield f"it has no option {option}"
        elif option not in group and option != "initial_lr":
            yield f"option {option} is not one of this optimizer"
        elif any(_differ(other[option], theirs[0][option]) for other in theirs):
            yield f"it has different {option} for parameters that are in one group here"


def _warn_of_other_betas(
    index: int, group: dict[str, Any], theirs: list[dict[str, Any]], options: Collection[str]
) -> None:
    """The bias correction presumes that moments were averaged with the group's own betas."""
    others = [other["betas"] for other in theirs if "betas" in other and _differ(other["betas"], group.get("betas"))]
    if others and "betas" in group and "betas" not in options:
        warnings.warn(
            f"the moments of group {index} were averaged with betas={tuple(others[0])!r} and go on with "
            f"betas={tuple(group['betas'])!r}, for which their bias correction is meant: add 'betas' to options to go "
            "on with the former",
            stacklevel=3,
        )


def _differ(one: Any, other: Any) -> bool:
    return _plain(one) != _plain(other)


def _plain(value: Any) -> Any:
    """A number, or numbers, for comparison: as a tensor, a tuple or a list."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value
